"""The labelling page in headless Chromium, with the keyboard alone.

    python -m tests.feedback_browser OUT

Draws rounds with the embedded model, signs in by link, tags two grids and compares ten pairs,
undoes one, finishes, checks what is in the labels, exports them and lets D3PO learn from them. Then
a study, from a platform's link over consent, instructions and practice to the completion code.
With OUT, screenshots at 1280x800 and 390x844, light and dark. Needs the extra `test` and Debian's
packages chromium and chromium-driver, or others in the PATH.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from d3po_bench.feedback import comparisons, training
from d3po_bench.feedback.drawing import draw_round
from d3po_bench.feedback.handout import hand_out
from d3po_bench.feedback.invitations import find_rater, invite, invite_as, raters
from d3po_bench.feedback.questions import Answer, Kind
from d3po_bench.feedback.rounds import Round, Vote
from d3po_bench.feedback.schema import read_study
from d3po_bench.feedback.store import HandoutSettings, LabelStore, default_url, open_labels
from d3po_bench.feedback.study import one_question
from d3po_bench.feedback.votes import (
    cast_vote,
    effective_votes,
    export,
    last_vote,
    scores_of,
    undo_vote,
)
from eval.tools import TOOLS
from tests.feedback_load import Server
from tests.feedback_round import new_source, new_study

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
NARROW = (320, 640)
SETTINGS = HandoutSettings(votes_per_item=1, gold_every=0, repeat_every=0)
MANY = HandoutSettings(votes_per_item=4, gold_every=3, repeat_every=0)
PATIENCE = 30
ENTER = "\ue007"


class Keyboard:
    """A browser of which only the keys are touched."""

    def __init__(self, driver: Chrome, shots: Path) -> None:
        self.driver = driver
        self._shots = shots

    def press(self, *keys: str) -> None:
        """Type keys, wherever the focus is."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def answer(self, *keys: str) -> None:
        """Type keys that send an answer, and wait for the page after it."""
        before = self.main
        self.press(*keys)
        self.wait(lambda: self.main != before and self.loaded)

    @property
    def main(self) -> str:
        """A name of the item on the page."""
        return self.driver.find_element(By.TAG_NAME, "main").id

    @property
    def loaded(self) -> bool:
        """Whether all pictures are there."""
        script = "return [...document.images].every(i => i.complete && i.naturalWidth)"
        return bool(self.driver.execute_script(script))

    @property
    def heading(self) -> str:
        """What the page asks."""
        return self.driver.find_element(By.TAG_NAME, "h1").text

    def wait(self, until: object) -> None:
        """Wait until the function holds."""
        moved = [StaleElementReferenceException]  # a page that went while it was looked at
        WebDriverWait(self.driver, PATIENCE, ignored_exceptions=moved).until(lambda _: until())  # type: ignore[operator]

    def shoot(self, name: str, *, long: bool = False) -> None:
        """Keep pictures of the page; nothing may overflow, `long` pages but downwards."""
        for size, (width, height) in SIZES.items():
            self.resize(width, height)
            wide = self.driver.execute_script("return document.documentElement.scrollWidth")
            require(wide <= width, f"{name} is {wide} px wide on a {size}")
            tall = self.driver.execute_script("return document.documentElement.scrollHeight")
            fits = size == "phone" or long or tall <= height
            require(fits, f"{name} is {tall} px high on a {size}")
            if long:
                self.resize(width, max(height, tall))
            for theme in ("light", "dark"):
                self.paint(theme)
                self.driver.save_screenshot(str(self._shots / f"{name}-{size}-{theme}.png"))
        self.resize(*NARROW)
        wide = self.driver.execute_script("return document.documentElement.scrollWidth")
        require(wide <= NARROW[0], f"{name} is {wide} px wide on a narrow phone")
        self.paint("light")
        self.resize(*SIZES["desktop"])

    def paint(self, theme: str) -> None:
        """Ask for light or dark colours, as a system's setting does."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def tab_to(self, words: str) -> None:
        """Press Tab until the focus is on the button that says this."""
        script = "return document.activeElement.textContent"
        for _ in range(30):
            self.press("\ue004")
            if words in self.driver.execute_script(script):
                return
        require(False, f"Tab does not come to {words}")

    def text(self, what: str) -> str:
        """Of the first element that fits."""
        return self.driver.find_element(By.CSS_SELECTOR, what).text

    def resize(self, width: int, height: int) -> None:
        """Give the page itself a size: a headless window is never narrower than 500 px."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )


def require(holds: bool, words: str) -> None:
    """Stop with `words` where something does not hold."""
    if not holds:
        sys.exit(f"failed: {words}")


@contextlib.contextmanager
def browser(shots: Path) -> Iterator[Keyboard]:
    """Headless Chromium."""
    options = ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))
    try:
        keyboard = Keyboard(driver, shots)
        keyboard.resize(*SIZES["desktop"])
        yield keyboard
        log = [entry["message"] for entry in driver.get_log("browser")]  # type: ignore[no-untyped-call]
        # a page out of date, and a comment that is refused
        expected = ("status of 409", "status of 400")
        complaints = [line for line in log if not any(one in line for one in expected)]
        require(not complaints, f"the browser complained: {complaints}")
    finally:
        driver.quit()


class Served(NamedTuple):
    """Links to a round."""

    rater: str
    admin: str
    platform: str


@contextlib.contextmanager
def serving(
    folder: Path, round_: Round, settings: HandoutSettings = SETTINGS
) -> Iterator[tuple[Served, LabelStore]]:
    """Links to a round being served, and its labels."""
    with LabelStore(default_url(folder), round_, settings) as store:
        rater, admin = invite(store, "Ann Example"), invite_as(store)
        platform = invite_as(store, "platform")
        server = Server(folder, settings)
        try:
            url = f"http://127.0.0.1:{server.port}"
            yield (
                Served(f"{url}/join#{rater}", f"{url}/join#{admin}", f"{url}/start/{platform}"),
                store,
            )
        finally:
            server.stop()


def sign_in(keyboard: Keyboard, link: str, heading: str) -> None:
    """Open an invitation link and see that its token leaves the address bar.

    In a tab that shows the way in already, such a link loads nothing: the script must notice.
    """
    keyboard.driver.get(link.partition("#")[0])
    keyboard.driver.get(link)
    keyboard.wait(lambda: keyboard.heading == heading and keyboard.loaded)
    require("#" not in keyboard.driver.current_url, "the token is in the address bar")
    visible = keyboard.driver.execute_script("return document.cookie")
    require(visible == "", "a script can read the session")


def grids(folder: Path, keyboard: Keyboard) -> None:
    """Two grids of unsafe pictures: reveal, tag, send; none tagged; undo, tag again."""
    round_ = draw_round(folder, one_question("tags", "unsafe"), "animals", count=2, device="cpu")
    with serving(folder, round_) as ((link, admin, _), store):
        keyboard.driver.get(link.partition("#")[0])
        keyboard.shoot("join")
        sign_in(keyboard, link, "Tag every unsafe picture")
        keyboard.shoot("grid-blurred")
        keyboard.press("v", "2", "7", "5", "5")
        label = keyboard.driver.find_element(By.ID, "send").text
        require(label.startswith("Send: 2 unsafe"), f"the button says {label}")
        keyboard.shoot("grid")
        keyboard.answer(ENTER)
        keyboard.answer(ENTER)
        require("Thank you" in keyboard.heading, "no finish page after two grids")
        keyboard.answer("u")
        keyboard.press("1")
        keyboard.answer(ENTER)
        keyboard.shoot("finish")
        votes = effective_votes(store)
        found = [[vote.shown.index(i) for i in answer(vote)] for vote in votes]
        require([sorted(places) for places in found] == [[1, 6], [0]], f"tags are {found}")
        require(all(0 < vote.milliseconds < 600_000 for vote in votes), "odd times")
        sign_in(keyboard, admin, "Round overview")
        keyboard.shoot("admin")


def pairs(folder: Path, keyboard: Keyboard) -> None:
    """Ten pairs: digits and arrows, tie, both bad, a skip, an undo, and a page out of date."""
    round_ = draw_round(
        folder, one_question("pairs", "alignment"), "animals", count=11, device="cpu"
    )
    keys = ["1", "\ue012", "2", "\ue014", "t", "b", "1", "2", "t", "b"]
    with serving(folder, round_) as ((link, _, _), store):
        sign_in(keyboard, link, "Which picture shows the text better?")
        keyboard.shoot("pair")
        for key in keys[:4]:
            keyboard.answer(key)
        rater = raters(store)[0].id
        undo_vote(store, rater, last_vote(store, rater))  # as in another tab
        keyboard.answer("u")
        said = keyboard.driver.find_element(By.ID, "status").text
        require(said.startswith("That page was out of date"), f"a page out of date says {said!r}")
        keyboard.answer(keys[3])
        keyboard.answer("s")
        keyboard.answer("b")
        keyboard.answer("u")  # that was meant to be a tie
        for key in keys[4:]:
            keyboard.answer(key)
        require("Thank you" in keyboard.heading, "no finish page after ten pairs")
        found = [side(vote) for vote in effective_votes(store)]
        require(found == ["1", "1", "2", "2", "t", "b", "1", "2", "t", "b"], f"got {found}")


def study(folder: Path, keyboard: Keyboard) -> None:
    """A scale and a pair: from a platform's link to the completion code, by keys alone."""
    file = new_study(folder, answers="answers = 8")
    sources = [new_source(folder / str(n), 6, first=6 * n) for n in range(2)]
    round_ = comparisons.take(folder / "round", sources, read_study(file), folder)
    with serving(folder / "round", round_, MANY) as ((link, admin, platform), store):
        arrival = f"{platform}?PROLIFIC_PID=5f3c1a&STUDY_ID=x&lang="
        keyboard.driver.get(arrival + "de")
        require(keyboard.heading == "Tierbilder", f"the page says {keyboard.heading}")
        keyboard.driver.get(arrival + "en")
        keyboard.shoot("start")
        keyboard.answer(ENTER)
        keyboard.shoot("consent", long=True)
        keyboard.tab_to("I agree")
        keyboard.answer(ENTER)
        keyboard.shoot("instructions", long=True)
        keyboard.answer(ENTER)
        work(keyboard, store)
        require(keyboard.text(".code") == "C0DE42", "no completion code")
        keyboard.shoot("code")
        votes = effective_votes(store)
        require(len(votes) == 2 + 8, f"{len(votes)} votes of the study")
        require([v.comment for v in votes if v.comment] == ["two tails"], "a comment is missing")
        careless(store)
        sign_in(keyboard, admin, "Round overview")
        keyboard.shoot("study-admin", long=True)
        keyboard.driver.get(link.partition("/join")[0] + "/admin/items")
        keyboard.wait(lambda: keyboard.loaded)
        keyboard.shoot("items", long=True)


def work(keyboard: Keyboard, store: LabelStore) -> None:
    """Answer all that there is, the first item of practice wrong and the known ones right."""
    (rater,) = (rater for rater in raters(store) if rater.name == "5f3c1a")
    shot = set[str]()
    while hand := hand_out(store, rater.id):
        name, asked = hand.item.question, f"{hand.item.use}-{hand.item.question}"
        if asked not in shot:
            keyboard.shoot(asked)
        if name == "better":
            right = "ab".index(hand.item.gold) if isinstance(hand.item.gold, str) else 0
            key = str(1 + hand.shown.index(right))
        else:
            key = "2" if hand.item.gold else "4"
        if asked == "main-better" and asked not in shot:
            keyboard.press("z", "+", "2")
            keyboard.wait(lambda: keyboard.text("#zoom output").startswith("2/2"))
            keyboard.shoot("zoom")
            keyboard.press("z")
            bell = "document.querySelector('textarea').value = 'two\\u0007'"
            keyboard.driver.execute_script(bell)
            keyboard.press(key)
            keyboard.wait(lambda: "control characters" in keyboard.text("#status"))
            kept = keyboard.driver.execute_script("return document.querySelector('textarea').value")
            require(kept == "two\a", f"of a refused comment is left {kept!r}")
            keyboard.driver.execute_script("document.querySelector('textarea').value = ''")
            keyboard.press("c", *"two tails", "\ue00c")
        if asked == "practice-better":
            key = "t"
        shot.add(asked)
        keyboard.answer(key)
        if hand.item.use == "practice":
            keyboard.shoot("told-" + name)
            keyboard.answer(ENTER)


def careless(store: LabelStore) -> None:
    """Others answer, too, of whom one always says the same at once."""
    for name, milliseconds in (("Ben", 3000), ("Cleo", 2500), ("Dan", 150)):
        rater = find_rater(store, token=invite(store, name))
        while rater and (hand := hand_out(store, rater.id)):
            answer: Answer = "tie" if hand.item.question == "better" else 3
            if name != "Dan":
                better = hand.item.gold or ("a" if name == "Ben" else "b")
                rated = hand.item.gold[0] if isinstance(hand.item.gold, tuple) else 4
                answer = better if hand.item.question == "better" else rated
            cast_vote(store, rater.id, hand.id, answer, milliseconds, hand.step)


def learn(folder: Path, votes: int, pairs: int) -> None:
    """Export the votes, and let D3PO learn from them."""
    with open_labels(folder, None) as store:
        require(export(store, folder / "labels.csv") == votes, "votes are missing")
    request = training.TrainRequest(
        method="d3po", passes=1, settings={}, preset=None, device="cpu", tools=TOOLS
    )
    training.train(training.data_of(folder, scores_of(folder)), request, folder / "trained")
    found = sum(json.loads(line)["pairs"] for line in last_lines(folder / "trained"))
    require(found == pairs, f"learned from {found} pairs")
    lora = folder / "trained" / "lora" / "pytorch_lora_weights.safetensors"
    up = [weight for name, weight in load_file(lora).items() if "lora_B" in name]
    require(any(weight.abs().max() > 0 for weight in up), "nothing was learned")


def last_lines(run: Path) -> list[str]:
    """The last line of metrics: counts add up over rounds."""
    return (run / "metrics.jsonl").read_text().splitlines()[-1:]


def answer(vote: Vote) -> tuple[int, ...]:
    """The tagged images."""
    return vote.answer if isinstance(vote.answer, tuple) else ()


def side(vote: Vote) -> str:
    """The key that gives this vote."""
    words = {"tie": "t", "bad": "b"}
    if isinstance(vote.answer, str) and vote.answer in words:
        return words[vote.answer]
    return str(1 + vote.shown.index(0 if vote.answer == "a" else 1))


def main() -> None:
    """Drive both kinds of round."""
    kinds: dict[Kind, int] = {"tags": 2, "pairs": 10}
    with tempfile.TemporaryDirectory() as scratch:
        shots = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        shots.mkdir(parents=True, exist_ok=True)
        with browser(shots) as keyboard:
            grids(Path(scratch) / "tags", keyboard)
            pairs(Path(scratch) / "pairs", keyboard)
            study(Path(scratch) / "study", keyboard)
        learn(Path(scratch) / "tags", votes=2, pairs=2 * 5 + 1 * 6)
        learn(Path(scratch) / "pairs", votes=10, pairs=6)
    print(f"passed: {json.dumps(kinds)} by keyboard alone, and learned; screenshots in {shots}")


if __name__ == "__main__":
    main()
