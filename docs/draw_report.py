"""Take `pictures/report-*.webp`: one recording of a report, light and dark. Needs playwright and Chromium.

CONTRIBUTING.md has the command that draws the picture of the README.
"""

import argparse
import io
import shutil
from pathlib import Path

from draw_style import PICTURES
from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, SCALE = 640, 2  # CSS pixels, and pixels of the picture for each; narrow, so that text stays large
PADDING = 14


def main() -> None:
    parser = argparse.ArgumentParser(description="Take pictures of one recording of a report.")
    parser.add_argument("report", type=Path, help="report.html of a run")
    parser.add_argument("--sentence", help="transcript of the recording; without, the first recording")
    parser.add_argument("--word", help="kept frame to choose, by its text; without, the first one")
    arguments = parser.parse_args()
    browsers = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not browsers:
        parser.error("needs Chromium: apt install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browsers[0])
        for scheme in ("light", "dark"):
            size = {"width": WIDTH, "height": 900}
            page = browser.new_page(color_scheme=scheme, viewport=size, device_scale_factor=SCALE)
            page.goto(arguments.report.resolve().as_uri())
            recording = page.locator("article.utterance")
            if arguments.sentence:
                recording = recording.filter(has_text=arguments.sentence)
            recording = recording.first
            if arguments.word:
                recording.get_by_role("button", name=arguments.word, exact=True).first.click()
            page.mouse.move(0, 0)
            page.evaluate('scrollTo({ top: 0, behavior: "instant" })')  # the clip counts from the page's top
            place = recording.bounding_box()
            clip = {
                "x": place["x"] - PADDING, "y": place["y"] - PADDING,
                "width": place["width"] + 2 * PADDING, "height": place["height"] + 2 * PADDING,
            }  # fmt: skip
            path = PICTURES / f"report-{scheme}.webp"
            Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).save(path, quality=88, method=6)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
