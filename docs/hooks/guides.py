"""List the guides that the navigation does not name, so that a new page is never lost."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append them to "Guides" in alphabetical order; the title is that of the page."""
    section = next(entry for entry in config.nav or [] if "Guides" in entry)
    named = {page for entry in section["Guides"] for page in (entry.values() if isinstance(entry, dict) else [entry])}
    found = sorted(f"guides/{path.name}" for path in Path(config.docs_dir, "guides").glob("*.md"))
    section["Guides"] += [page for page in found if page not in named and page.count(".") == 1]
    return config
