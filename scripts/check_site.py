"""Check a built documentation site: every link within it leads somewhere, and no page asks another server for anything.

python scripts/check_site.py site        # `make site` builds the site and calls this
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["Page", "faults", "main"]

FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}  # what a browser loads
NO_RESOURCE = {"canonical", "next", "prev", "alternate"}  # relations of <link> that load nothing


@dataclass
class Page(HTMLParser):
    """Links of an HTML page, what it loads, and the anchors that it has."""

    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def read(cls, path: Path) -> Page:
        """The page in that file."""
        page = cls()
        page.feed(path.read_text("utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.anchors |= {named[name] for name in ("id", "name") if named.get(name)}
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        elif FETCHED.get(tag) in named and named.get("rel") not in NO_RESOURCE:
            self.loads.append(named[FETCHED[tag]])


def faults(site: Path) -> Iterator[str]:
    """One line for every link that leads nowhere and every resource from outside."""
    pages = {path: Page.read(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        where = path.relative_to(site)
        yield from (f"{where} loads {url}" for url in page.loads if urlsplit(url).netloc)
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{where} links to {url}, which is not there"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{where} links to {url}, which has no such heading"


def main(folder: str) -> None:
    """Print the faults of a site; exit with 1 if there are any, or no page at all."""
    site = Path(folder).resolve()
    if not (site / "index.html").exists():
        sys.exit(f"{site} has no index.html; build the site first: make site.")
    found = list(faults(site))
    for line in found:
        print(line)
    print(f"{len(list(site.rglob('*.html')))} pages, {len(found)} faults")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
