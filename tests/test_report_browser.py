"""The page as a browser shows it: quiet, self-contained, nothing beyond its edge, readable."""

import base64
import json

import pytest

from browser import Browser, find_browser
from findings import empty_findings, make_findings
from reports import HOSTILE, add_fleet, write_full_run, write_run
from sidetune.report import write_report
from sweeps import small_sweep

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no chromium, chromium-browser or google-chrome on the path"
)

NAMES = [
    HOSTILE,
    "\u202egnp.exe",
    "folder/" + "a" * 300 + ".png",
    "مرحبا.png",
    "写真 1.png",
]
LONG = ["W" * 120, "\u202eright to left", "two words and some more of them in one name", HOSTILE]
GRID = [f"lr={lr} seed={seed} side=losa" for lr in ("1e-3", "3e-3", "1e-2") for seed in range(6)]
WIDTHS = [360, 768, 1280]

# Names of faults, and for each the texts or addresses that have it.
FAULTS = """(() => {
  document.querySelectorAll('details').forEach(one => one.open = true);
  const faults = {};
  const add = (name, what) => (faults[name] ??= []).push(what);
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) add('wider than the window', `${root.scrollWidth} > ${innerWidth}`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) add('broken picture', image.alt);

  const parse = text => {
    const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a ?? 1];
  };
  const over = (top, under) => under.map((value, i) => top[3] * top[i] + (1 - top[3]) * value);
  const light = color => {
    const [r, g, b] = color.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]);
  };

  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement, text = node.data.trim().slice(0, 60);
    if (!text || element.closest('.hidden') || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), range = document.createRange();
    range.selectNodeContents(node);
    const scrolls = element.closest('.scroll');
    const frame = (element.closest('section') ?? document.body).getBoundingClientRect();
    for (const box of range.getClientRects())
      if (!scrolls && box.width && (box.left < frame.left - .5 || box.right > frame.right + .5))
        add('beyond its section', text);
    for (let e = element; e && e !== scrolls; e = e.parentElement) {
      const hides = getComputedStyle(e).overflowX !== 'visible';
      if (hides && e !== document.body && e.scrollWidth > e.clientWidth + 1) add('clipped', text);
    }
    const ink = parse(element.closest('svg') ? style.fill : style.color), paper = ground(element);
    const [dark, bright] = [light(over(ink, paper)), light(paper)].sort((a, b) => a - b);
    const contrast = (bright + .05) / (dark + .05);
    if (contrast < 4.5) add('contrast', `${text}: ${contrast.toFixed(2)}`);
    if (parseFloat(style.fontSize) < 10) add('small', text);
  }
  return faults;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def hostile_run(folder, kind="classify"):
    """Names as bad as they come, in files and classes alike."""
    metrics, _ = write_full_run(folder, kind=kind, num_outputs=4)
    text = (folder / "metrics.json").read_text()
    for old, new in zip(metrics["outputs"], LONG, strict=True):
        text = text.replace(json.dumps(old), json.dumps(new))
    (folder / "metrics.json").write_text(text)
    metrics["outputs"] = LONG
    (folder / "findings.json").write_text(json.dumps(make_findings(metrics, paths=NAMES)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory, image_folder):
    """Pages by name: each task with all there is, nothing found, an older one, hostile names, a sweep's."""
    root = tmp_path_factory.mktemp("pages")
    for kind in ("classify", "multilabel", "regress"):
        write_full_run(root / kind, kind=kind)
    write_full_run(root / "empty", findings=empty_findings)
    write_full_run(root / "twenty", num_outputs=20)
    write_run(root / "older", num_outputs=25)
    for kind, labels, folds in (("members", GRID, 5), ("members-hostile", [*LONG, *GRID], None)):
        write_full_run(root / kind)
        add_fleet(root / kind, labels, folds)
    hostile_run(root / "hostile")
    hostile_run(root / "hostile-multilabel", kind="multilabel")
    swept = small_sweep(image_folder, tmp_path_factory.mktemp("sweep"), trials=24).folder / "report.html"
    return {run.name: write_report(run) for run in sorted(root.iterdir())} | {"sweep": swept}


KINDS = [
    "classify",
    "multilabel",
    "regress",
    "empty",
    "twenty",
    "older",
    "members",
    "members-hostile",
    "hostile",
    "hostile-multilabel",
    "sweep",
]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_fetched_and_nothing_overflows(browser, pages, kind):
    for width in WIDTHS:
        dark = width == 768
        browser.open(pages[kind], width=width, dark=dark)
        assert browser.run(FAULTS) == {}, f"{width} px"
        assert browser.messages() == []
        fetched = [url for url in browser.requests() if not url.startswith("data:")]
        assert fetched == [pages[kind].as_uri()]


@pytest.mark.parametrize("kind", ["classify", "members", "hostile"])
def test_dark_is_dark_and_as_readable(browser, pages, kind):
    grounds = {}
    for dark in (False, True):
        browser.open(pages[kind], width=360, dark=dark)
        grounds[dark] = browser.run("getComputedStyle(document.body).backgroundColor")
        assert browser.run(FAULTS) == {}
    assert grounds == {False: "rgb(245, 246, 248)", True: "rgb(15, 18, 22)"}


def test_the_measure_finds_what_it_looks_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='margin:0'><section style='width:100px'><p style='color:#999'>grey</p>"
        f"<p>{'W' * 400}</p><p style='overflow:hidden'>{'W' * 60}</p><p style='font-size:8px'>tiny</p>"
        "<img src='data:image/png;base64,AAAA' alt='gone'></section><script>console.warn('x')</script>"
    )
    browser.open(page, width=360)
    faults = browser.run(FAULTS)
    assert set(faults) == {
        "wider than the window",
        "broken picture",
        "beyond its section",
        "clipped",
        "contrast",
        "small",
    }
    assert [event["method"] for event in browser.messages()] == ["Runtime.consoleAPICalled"]


def test_without_colour_shape_and_weight_tell(browser, pages):
    browser.open(pages["classify"])
    styles = browser.run("""(() => {
      const of = (query, name) => [...document.querySelectorAll(query)].map(e => getComputedStyle(e)[name]);
      return {
        diagonal: of('.matrix .diagonal', 'boxShadow'),
        others: of('.matrix td:not(.diagonal)', 'boxShadow'),
        best: of('.best', 'fontWeight'),
        own: of('.forest .mine .point', 'backgroundColor'),
        rest: of('.forest .track:not(.mine) .point', 'backgroundColor'),
        card: of('section', 'backgroundColor')[0],
      };
    })()""")
    assert len(styles["diagonal"]) == 3 and all("inset" in shadow for shadow in styles["diagonal"])
    assert {shadow for shadow in styles["others"] if "inset" in shadow} == set()
    assert set(styles["best"]) == {"700"}
    assert set(styles["rest"]) == {styles["card"]} and styles["card"] not in styles["own"]


def test_evidence_covers_the_picture_beside_the_plain_one(browser, pages):
    browser.open(pages["classify"])
    boxes = browser.run("""[...document.querySelectorAll('.over')].map(over => {
      const box = e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
      const frame = over.closest('.picture');
      return [box(over), box(frame.querySelector('.lit')), box(frame.previousElementSibling)];
    })""")
    shown = [(over, under, plain) for over, under, plain in boxes if over[2]]
    assert len(shown) >= 12
    for over, under, plain in shown:
        assert over == under and over[2:] == pytest.approx(plain[2:]) and over[1] == plain[1]
        assert over[0] >= plain[0] + plain[2]


def test_the_keyboard_reaches_links_folds_and_wide_tables(browser, pages):
    browser.open(pages["classify"], width=360)
    reached = []
    for _ in range(26):
        for kind in ("rawKeyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(
            browser.run("""(() => {
              const element = document.activeElement;
              return [element.tagName, getComputedStyle(element).outlineStyle];
            })()""")
        )
    assert {name for name, _ in reached} >= {"A", "DIV", "SUMMARY"}
    assert {outline for name, outline in reached if name != "BODY"} == {"solid"}


def test_it_prints_light_and_within_the_paper(browser, pages):
    browser.open(pages["classify"], width=718, dark=True, media="print")  # A4 less margins, at 96 dpi
    assert browser.run("getComputedStyle(document.body).color") == "rgb(22, 25, 29)"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    pdf = base64.b64decode(browser.send("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
