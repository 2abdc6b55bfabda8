"""mkdocs: a link to a file outside docs/, which a checkout has and the site has not, becomes its text."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    up = r"\.\./" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({up}[^)]+\)", r"`\1`", markdown)
