"""HTML pages: each is one file that needs no network. All values are shown as text, whatever they contain.

Jinja escapes every value. The page's Content-Security-Policy allows only the style and the script whose digests it
names: no handlers or styles within tags, no other scripts, no requests.
"""

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(package: str, template: str, style: str, script: str = "", media: str = "", **values: Any) -> str:
    """The HTML of a package's template with `values`; the template also gets `policy`, `style` and `script`.

    Args:
        style, script: our own CSS and JavaScript, which are not escaped.
        media: a policy for media inside the page, such as "img-src data:".
    """
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    own = {"script-src": script, "style-src": style}
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"] + ([media] if media else [])
    rules += [f"{rule} '{_digest(text)}'" for rule, text in own.items() if text]
    texts = {"style": Markup(style), "script": Markup(script)}  # our own, so not escaped
    return environment.get_template(template).render(policy="; ".join(rules), **texts, **values)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
