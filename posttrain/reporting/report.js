// Players. Each card is one video whose panels lie side by side, so that they cannot fall out of step.
const data = JSON.parse(document.getElementById("data").textContent);
const cards = [...document.querySelectorAll(".card")].map((element, i) => ({
  ...data[i],
  video: element.querySelector("video"),
  slider: element.querySelector("input"),
  dots: [...element.querySelectorAll("circle")],
  stage: element.querySelector(".stage"),
  visible: false,
  paused: false,
}));
const play = document.getElementById("play");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let speed = 1;

function draw(card) {
  const frame = Math.min(card.frames - 1, Math.floor(card.video.currentTime * card.fps + 1e-3));
  card.slider.value = frame;
  card.dots.forEach((dot, i) => {
    const at = card.paths[i][frame];
    dot.style.display = at ? "" : "none";
    if (at) { dot.setAttribute("cx", at[0] + i * card.width); dot.setAttribute("cy", at[1]); }
  });
}

function apply(card) {
  card.video.playbackRate = speed;
  if (playing && card.visible && !card.paused) card.video.play().catch(() => {}); else card.video.pause();
}

function applyAll() {
  if (play) play.textContent = playing ? "Pause" : "Play";
  cards.forEach(apply);
}

const watch = new IntersectionObserver(entries => entries.forEach(entry => {
  const card = cards.find(c => c.stage === entry.target);
  card.visible = entry.isIntersecting;
  apply(card);
}), { rootMargin: "100px" });

cards.forEach(card => {
  watch.observe(card.stage);
  card.slider.addEventListener("input", () => {
    card.paused = true;
    card.video.pause();
    card.video.currentTime = (Number(card.slider.value) + 0.5) / card.fps;
  });
  card.stage.addEventListener("click", () => {
    card.paused = !card.video.paused;
    if (!card.paused && !playing) { playing = true; cards.forEach(c => { c.paused = c !== card; }); }
    applyAll();
  });
  card.video.addEventListener("seeked", () => draw(card));
  draw(card);
});
if (play) play.addEventListener("click", () => {
  playing = !playing;
  if (playing) cards.forEach(card => { card.paused = false; });
  applyAll();
});
document.querySelectorAll(".speeds button").forEach(button => button.addEventListener("click", () => {
  speed = Number(button.value);
  document.querySelectorAll(".speeds button").forEach(b => b.setAttribute("aria-pressed", b === button));
  applyAll();
}));
const trace = document.getElementById("trace");
if (trace) trace.addEventListener("change", () => document.body.classList.toggle("plain", !trace.checked));
(function tick() {
  cards.forEach(card => { if (!card.video.paused) draw(card); });
  requestAnimationFrame(tick);
})();
applyAll();
