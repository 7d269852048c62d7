"""Follow every link and picture of the built site; one that leads nowhere stops the build."""

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "__top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note links, pictures, scripts and names."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.places.add(value)


@cache
def read(file: Path) -> Page:
    """One page, parsed once."""
    return Page(file.read_text())


def trouble(site: Path, file: Path, link: str) -> str:
    """What is wrong with a link in `file`, "" if nothing is."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return "" if parts.scheme in ("https", "data", "mailto") else "not https"
    target = site / parts.path.lstrip("/") if parts.path.startswith("/") else file.parent / unquote(parts.path)
    target = file if not parts.path else target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "no such file"
    missing = target.suffix == ".html" and unquote(parts.fragment) not in read(target).places
    return "no such place in the page" if missing else ""


@event_priority(-100)
def on_post_build(config: MkDocsConfig, **kwargs: Any) -> None:
    """Check all pages, of both languages; a site without an address has no map of addresses."""
    site = Path(config.site_dir)
    for file in () if config.site_url else site.glob("sitemap.xml*"):
        file.unlink()
    read.cache_clear()
    files = [file for file in site.rglob("*.html") if file.name != "404.html"]
    wrong = {
        f"{file.relative_to(site)}: {link}: {why}"
        for file in files
        for link in read(file).links
        if (why := trouble(site, file, link))
    }
    if wrong:
        raise PluginError("links that lead nowhere:\n" + "\n".join(sorted(wrong)))
