#!/usr/bin/env python
"""How many bytes pages are: of files as they lie, and gzip'd as a server would send them; of a running demo what a
browser with an empty cache fetches until the first hits are there.

    python scripts/measure_pages.py runs/demo/report.html diff.html map.html
    python scripts/measure_pages.py --demo http://127.0.0.1:7860
"""
import argparse
import gzip
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]
from browsing import CHROMIUM  # noqa: E402


def fetched(address: str) -> dict[str, tuple[int, int]]:
    "What -> (requests, bytes over the wire) until the first hits stand on the page, and of their pictures."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, sizes, names = browser.new_page(), {}, {}
        wire = page.context.new_cdp_session(page)
        wire.send("Network.enable")
        wire.on("Network.responseReceived", lambda told: names.update({told["requestId"]: told["response"]["url"]}))
        wire.on("Network.loadingFinished", lambda told: sizes.update({told["requestId"]: told["encodedDataLength"]}))
        page.goto(address)
        page.locator(".moon2-hits button img").first.wait_for(timeout=300_000)
        page.wait_for_timeout(3000)
        browser.close()
    sums = {"program of Gradio": [0, 0], "pictures of hits and examples": [0, 0]}
    for name, size in sizes.items():
        part = sums["pictures of hits and examples" if "/file=" in names.get(name, "") else "program of Gradio"]
        part[0], part[1] = part[0] + 1, part[1] + int(size)
    return {what: tuple(both) for what, both in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--demo", metavar="ADDRESS")
    args = parser.parse_args()
    for path in args.files:
        content = path.read_bytes()
        print(f"{path}: {len(content):,} bytes, gzip {len(gzip.compress(content)):,}")
    for what, (requests, size) in fetched(args.demo).items() if args.demo else ():
        print(f"{args.demo}, {what}: {requests} requests, {size:,} bytes")


if __name__ == "__main__":
    main()
