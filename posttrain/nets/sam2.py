"""SAM 2 (arXiv 2408.00714) from transformers, following one object per clip: differentiable, many clips at once.

`Sam2VideoModel.forward` runs under inference_mode and takes one clip at a time. Here the model's own steps (encode the
frame, attend to the memory, decode a mask, encode the memory) are called in the same order, on an inference session
whose batch is the clips. For one clip the logits are equal bit for bit (tested). Two lines in transformers 5 assume a
batch of one, and are corrected here: the memory attention returns its axes in another order, and a mask prompt's object
pointer is broadcast.

Notes on the gradient: an object score <= 0 sets all logits to -1024, without gradient (the embedded model's score is
fixed at +10); frame 0's output is the prompt itself; masks have a quarter of the height and width of the network's
input; memories are stored in bf16.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from posttrain.core.files import replacing
from posttrain.models.base import ModelConfig
from posttrain.models.folders import network
from posttrain.nets.precision import widened

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SAM 2's normalisation of pixels in [0, 1]


class Sam2Tracker(nn.Module):
    """Follows the object that `mask0_BHW` marks in frame 0. Frames are scaled to the model's size."""

    def __init__(self, sam: Sam2VideoModel) -> None:
        super().__init__()
        self.sam = sam
        self.sam.memory_attention.register_forward_hook(lambda module, inputs, output: output.transpose(0, 1))
        # not trained: the score (see above), and weights that mask prompts never use, as DDP would wait for gradients
        self.sam.mask_decoder.pred_obj_score_head.requires_grad_(False)
        self.sam.mask_decoder.iou_prediction_head.requires_grad_(False)
        for parameter in (self.sam.no_memory_embedding, self.sam.no_memory_positional_encoding):
            parameter.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Sam2Tracker":
        """Stays in evaluation mode: transformers' model returns no object score in training mode, and then fails."""
        return super().train(False)

    def forward(self, video_BCFHW: Tensor, mask0_BHW: Tensor, teacher_BFHW: Tensor | None = None) -> Tensor:
        """Mask logits (B, F, H, W), differentiable through memory to every frame; frame 0's are about +-10.

        Args:
            video_BCFHW: pixels in [-1, 1].
            mask0_BHW: bool, the object in frame 0.
            teacher_BFHW: bool, true masks to remember in place of the network's own (training only).
        """
        frames = video_BCFHW.shape[2]
        return torch.cat(list(self.follow(video_BCFHW.unbind(2), frames, mask0_BHW, teacher_BFHW=teacher_BFHW)), 1)

    def follow(
        self,
        pictures: Iterable[Tensor],
        frames: int,
        mask0_BHW: Tensor | None = None,
        points_P2: Tensor | None = None,
        labels_P: Tensor | None = None,
        teacher_BFHW: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """As `forward`, frame by frame: logits (B, 1, H, W) for each of `frames` pictures (B, C, H, W) in [-1, 1].

        Old memories are dropped, so a long video needs no more memory than a short one. Instead of a mask, clicks on
        frame 0 may be given (for one clip at a time); the network then predicts frame 0's mask from the clicks.

        Args:
            points_P2: x (right) and y (down) in pixels of the picture; 0 is the centre of the first pixel.
            labels_P: 1 on the object, 0 outside it.
        """
        size = (self.sam.config.image_size, self.sam.config.image_size)
        memory = max(self.sam.config.num_maskmem, self.sam.config.max_object_pointers_in_encoder)
        session: Sam2VideoInferenceSession | None = None
        for t, picture in enumerate(map(widened, pictures)):
            batch, _, height, width = picture.shape
            if session is None:
                session = Sam2VideoInferenceSession(
                    video_height=height, video_width=width, inference_device=picture.device, dtype=picture.dtype
                )
                session.processed_frames = dict.fromkeys(
                    range(frames)
                )  # only their number is used: the features are given
                session.obj_id_to_idx(0)
            mean, std = (picture.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
            enlarged = F.interpolate((picture + 1) / 2, size, mode="bilinear", antialias=True)
            seen = self.sam.get_image_features((enlarged - mean) / std, return_dict=True)
            features = {"vision_feats": seen.fpn_hidden_states, "vision_pos_embeds": seen.fpn_position_encoding}
            session.cache.cache_vision_features(t, features)
            given = t == 0
            mask, clicks = None, None
            if given and mask0_BHW is not None:
                mask = F.interpolate(mask0_BHW[:, None].to(picture), size)
            elif given and points_P2 is not None and labels_P is not None:
                scaled = points_P2.to(picture) * picture.new_tensor([size[1] / width, size[0] / height])
                clicks = {"point_coords": scaled[None, None], "point_labels": labels_P.to(picture.device)[None, None]}
            out = self.sam._run_single_frame_inference(
                inference_session=session,
                obj_idx=0,
                frame_idx=t,
                batch_size=1,  # features already hold the batch
                is_init_cond_frame=given,
                point_inputs=clicks,
                mask_inputs=mask,
                reverse=False,
            )
            if mask is not None:
                out["object_pointer"] = out["object_pointer"].diagonal().T[:, None]
            remembered = out.pop("high_res_masks")
            if teacher_BFHW is not None and not given:
                remembered = F.interpolate(20 * teacher_BFHW[:, t, None].to(picture) - 10, size)
            session.store_output(0, t, output_value=out, is_conditioning_frame=given)
            features_t, position = self.sam._encode_new_memory(
                current_vision_feats=seen.fpn_hidden_states[-1],
                pred_masks_high_res=remembered,
                object_score_logits=out["object_score_logits"].reshape(batch, 1, 1),
                is_mask_from_pts=given,
            )
            kept = session.output_dict_per_obj[0]["cond_frame_outputs" if given else "non_cond_frame_outputs"]
            kept[t] |= {"maskmem_features": features_t, "maskmem_pos_enc": position}
            kept.pop(t - memory, None)
            yield F.interpolate(widened(out["pred_masks"]), (height, width), mode="bilinear")


def new(config: Sam2VideoConfig, seed: int = 0) -> Sam2Tracker:
    """Random weights; the object score is fixed at +10, so logits keep a gradient (see the module's docstring).

    transformers' code limits small architectures: memory_encoder_output_channels is 64, hidden sizes are larger, widths
    grow from stage to stage, and a stage's first layer has no global attention.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tracker = Sam2Tracker(Sam2VideoModel(config))
    return always_there(tracker)


def always_there(tracker: Sam2Tracker) -> Sam2Tracker:
    """Fix the object score at +10: the tracker never decides that the object is absent, so logits keep a gradient."""
    score = tracker.sam.mask_decoder.pred_obj_score_head.proj_out
    nn.init.zeros_(score.weight)
    nn.init.constant_(score.bias, 10.0)
    return tracker


class Model:
    """A SAM 2 tracker. Calling it gives mask logits (B, F, H, W); see `Sam2Tracker.forward`."""

    def __init__(self, module: Sam2Tracker) -> None:
        self.module: nn.Module = module
        self.tracker = module

    def __call__(self, video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
        return self.module(video_BCFHW, mask0_BHW)

    @torch.no_grad()
    def clicks(
        self, pictures: Iterable[np.ndarray], frames: int, points_P2: np.ndarray, labels_P: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Masks, bool (H, W), one per picture (uint8 (H, W, 3)), of the object that the clicks mark in the first one.

        See `Sam2Tracker.follow` for points and labels.
        """
        device = next(self.module.parameters()).device
        shown = (torch.tensor(p, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in pictures)
        points, labels = torch.from_numpy(points_P2), torch.from_numpy(labels_P)
        for logits in self.tracker.follow(shown, frames, points_P2=points, labels_P=labels):
            yield (logits[0, 0] > 0).cpu().numpy()

    def save(self, path: Path) -> None:
        """Write the transformers folder (config.json, model.safetensors) `path`."""
        with replacing(path) as temporary:
            self.tracker.sam.save_pretrained(temporary)


def load(config: ModelConfig, device: str = "cpu") -> Model:
    """The SAM 2 in `config.path`: a transformers folder, or a hub id such as facebook/sam2.1-hiera-large.

    "pocket" is the embedded one; `init: random` uses only its architecture.

    Raises:
        UserError: the folder does not hold a Sam2VideoModel, or is incomplete.
    """
    sam = network(Sam2VideoModel, config, "sam2")
    module = new(sam, config.seed) if config.init == "random" else Sam2Tracker(sam)
    return Model(module.to(device))
