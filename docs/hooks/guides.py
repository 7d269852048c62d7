"""List the guides that the navigation does not name, so that a new page is never lost."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append them to "Guides" in alphabetical order, under the title of the page, so that it can be translated."""
    section = next(entry for entry in config.nav or [] if "Guides" in entry)
    named = {page for entry in section["Guides"] for page in (entry.values() if isinstance(entry, dict) else [entry])}
    for path in sorted(Path(config.docs_dir, "guides").glob("*.md")):
        if (page := f"guides/{path.name}") not in named and page.count(".") == 1:
            section["Guides"].append({path.read_text().partition("\n")[0].removeprefix("# "): page})
    return config
