"""Chinese pages: lines are joined as a browser should show them, and a page that is still in English says so."""

import logging
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

WIDE = r"[\u2018-\u201d\u2026\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]"
MARKS = r"[\u3001\u3002\uff01\uff09\uff0c\uff1a\uff1b\uff1f]"
UNTRANSLATED = '!!! note "本页尚未翻译，以下为英文原文。"\n\n'
ENDS = re.compile(rf"(?<={WIDE})\n *(?={WIDE})|(?<={MARKS})\n *(?=\w|\[|`[^`])")


def on_config(config: Any) -> None:
    """Jieba, which parts Chinese words for the search, need not say that it begins."""
    logging.getLogger("jieba").setLevel(logging.WARNING)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **kwargs: Any) -> str:
    """Take out the ends of lines between two Chinese characters, and those behind a Chinese mark."""
    if config.theme["language"] == "zh" and not page.file.src_uri.endswith(".zh.md"):
        return UNTRANSLATED + markdown
    return ENDS.sub("", markdown)
