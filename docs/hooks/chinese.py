"""Join the lines of a Chinese paragraph: a browser would show each line's end as a space."""

import logging
import re
from typing import Any

WIDE = r"[\u2018-\u201d\u2026\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]"
MARKS = r"[\u3001\u3002\uff01\uff09\uff0c\uff1a\uff1b\uff1f]"
ENDS = re.compile(rf"(?<={WIDE})\n *(?={WIDE})|(?<={MARKS})\n *(?=\w|\[|`[^`])")


def on_config(config: Any) -> None:
    """Jieba, which parts Chinese words for the search, need not say that it begins."""
    logging.getLogger("jieba").setLevel(logging.WARNING)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Take out the ends of lines between two Chinese characters, and those behind a Chinese mark."""
    return ENDS.sub("", markdown)
