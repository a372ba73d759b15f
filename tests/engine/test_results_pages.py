"""Reports of a run and of a sweep in a real browser: they render, complain of nothing, load nothing, and their tables sort."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from recorded_pages import write_run, write_sweep

from raydistill.report.listing import results_command

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: apt-get install chromium"),
]
WIDE, NARROW = 1280, 390


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the report of a run and of a sweep."""
    output = tmp_path_factory.mktemp("pages")
    write_run(output / "runs" / "mine", num_steps=30)
    write_sweep(output / "sweeps" / "rates")
    assert results_command(["report", str(output / "runs" / "mine")]) == 0
    assert results_command(["report", "rates", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


def pages(output: Path) -> tuple[Path, Path]:
    return output / "runs" / "mine" / "report.html", output / "sweeps" / "rates" / "page.html"


def column(tab: Page, section: str, number: int) -> list[str]:
    """The texts of a column of a section's first sortable table, as they stand now."""
    rows = f"document.querySelector('#{section} table.sortable').tBodies[0].rows"
    texts: list[str] = tab.evaluate(f"Array.from({rows}, row => row.cells[{number}].textContent)")
    return texts


def header(section: str, title: str) -> str:
    """JavaScript for the button of a header."""
    table = f"document.querySelector('#{section} table.sortable')"
    return f"Array.from({table}.querySelectorAll('th button')).find(button => button.textContent === {title!r})"


def click(tab: Page, section: str, title: str) -> None:
    """A real click, where the button is."""
    script = f"(() => {{ const b = {header(section, title)}; b.scrollIntoView({{block: 'center'}}); "
    box = tab.evaluate(
        script + "const r = b.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        tab.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)


def test_pages_render_complain_of_nothing_and_load_nothing(tab: Page, output: Path) -> None:
    for path in pages(output):
        tab.look(WIDE)
        tab.open(path)
        assert tab.errors == []
        assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()]
        widths = tab.evaluate("Array.from(document.images, image => image.naturalWidth)")
        assert len(widths) >= 2
        assert min(widths) > 0
        assert tab.evaluate("typeof window.broken") == "undefined", "text of a run was run"


def test_pages_fit_wide_and_narrow_windows(tab: Page, output: Path) -> None:
    for path in pages(output):
        for width in (WIDE, NARROW):
            tab.look(width)
            tab.open(path)
            assert tab.evaluate("document.documentElement.scrollWidth") == width, f"{path.name} at {width}"


def test_a_dark_desktop_gets_dark_pages_and_dark_pictures(tab: Page, output: Path) -> None:
    for path in pages(output):
        shown = {}
        for dark in (False, True):
            tab.look(WIDE, dark=dark)
            tab.open(path)
            ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            shown[dark] = (ground, tab.evaluate("document.images[0].currentSrc"))
        assert shown[True][0] == "rgb(18, 22, 27)"
        assert shown[False][0] != shown[True][0]
        assert shown[False][1] != shown[True][1]


def test_a_click_on_a_header_sorts_numbers_as_numbers_and_a_second_one_turns_the_order(tab: Page, output: Path) -> None:
    tab.look(WIDE)
    tab.open(pages(output)[0])
    assert column(tab, "comparison", 0) == ["teacher", "ptq-int4", "ptq-int2", "student"]
    click(tab, "comparison", "size")
    assert column(tab, "comparison", 5) == ["90 KB", "90 KB", "416 KB", "1 MB"]
    assert tab.evaluate(header("comparison", "size") + ".closest('th').getAttribute('aria-sort')") == "ascending"
    click(tab, "comparison", "size")
    assert column(tab, "comparison", 5) == ["1 MB", "416 KB", "90 KB", "90 KB"]
    click(tab, "comparison", "model")
    assert column(tab, "comparison", 0) == ["ptq-int2", "ptq-int4", "student", "teacher"]
    assert tab.evaluate(header("comparison", "size") + ".closest('th').getAttribute('aria-sort')") is None


def test_the_keyboard_sorts_too_and_what_is_missing_stays_last(tab: Page, output: Path) -> None:
    tab.look(WIDE)
    tab.open(pages(output)[1])
    title = "evaluate/kl_nats"
    before = column(tab, "table", 3)
    assert before[-1] == "-"
    tab.evaluate(header("table", title) + ".focus()")
    for order in (before[:-1], before[:-1][::-1]):
        tab.press("Enter")
        assert column(tab, "table", 3) == [*order, "-"]


def test_printing_opens_what_is_folded(tab: Page, output: Path, tmp_path: Path) -> None:
    tab.look(WIDE)
    tab.open(pages(output)[0])
    num_open = "document.querySelectorAll('details[open]').length"
    tab.evaluate(f"window.addEventListener('beforeprint', () => {{ window.open_then = {num_open}; }})")
    folded = tab.evaluate("document.querySelectorAll('details').length")
    assert tab.pdf(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert tab.evaluate("window.open_then") == folded
    assert tab.evaluate(num_open) == 0
