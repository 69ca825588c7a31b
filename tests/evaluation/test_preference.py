"""The page asks blind and in random order; votes become the right rates, ratings and intervals."""

import base64
import json
import shutil

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from PIL import Image

from mmdit_jax.evaluation import preference
from mmdit_jax.evaluation.preference import Vote

PROMPTS = ["a red circle", 'a sign that says "<b>hi</script>"', "two squares & a dot"]


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Of three systems, as `mmdit_jax.sample` leaves them; each picture has its own colour."""
    made = []
    for system, name in enumerate(("base", "dpo", "large")):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(len(PROMPTS)):
            Image.new("RGB", (16, 16), (60 * i, 80 * system, 90)).save(folder / f"{i:04d}.png")
        (folder / "settings.json").write_text(json.dumps({"prompts": PROMPTS, "step": 3}))
        made.append(str(folder))
    return made


def test_every_pair_is_asked_once_and_the_key_says_who_is_where(folders):
    systems = preference.read_samples(folders)
    content = preference.make_page(systems, seed=1)
    names, key = json.loads(base64.b64decode(content["key"]))
    assert names == ["base", "dpo", "large"]
    assert len(key) == len(content["pairs"]) == 9
    assert len({(prompt, frozenset(sides)) for prompt, *sides in key}) == 9
    for (prompt, left, right), (text, *shown) in zip(key, content["pairs"], strict=True):
        assert text == PROMPTS[prompt]
        for system, picture in zip((left, right), shown, strict=True):
            data = base64.b64decode(content["pictures"][picture].partition(",")[2])
            assert data == systems[system].pictures[prompt]


def test_sides_and_order_are_random_and_follow_from_the_seed(folders):
    systems = [
        s._replace(prompts=s.prompts * 40, pictures=s.pictures * 40)
        for s in preference.read_samples(folders)
    ]
    pages = [preference.make_page(systems, seed) for seed in (1, 1, 2)]
    assert pages[0] == pages[1] and pages[0]["key"] != pages[2]["key"]
    assert pages[0]["study"] != pages[2]["study"]
    _, key = json.loads(base64.b64decode(pages[0]["key"]))
    swapped = np.mean([left > right for _, left, right in key])
    assert 0.4 < swapped < 0.6  # of 360, five standard deviations
    order = [prompt for prompt, *_ in key]
    assert abs(scipy.stats.spearmanr(order, range(len(order))).statistic) < 0.25
    numbers = [min(shown) for _, *shown in pages[0]["pairs"]]
    assert abs(scipy.stats.spearmanr(numbers, order).statistic) < 0.25


def test_the_page_shows_no_name_and_no_prompt_ends_its_script(folders, tmp_path):
    path = preference.write_page(folders[:2], str(tmp_path / "study"))
    assert path == str(tmp_path / "study" / "index.html")
    text = open(path).read()
    assert "CONTENT" not in text and text.count("</script>") == 2
    plain = text.replace(text[text.index('"key"') : text.index('"key"') + 400], "")
    assert "base" not in plain.replace("base64", "") and "dpo" not in plain
    assert "http" not in text.replace("http-equiv", "")
    for question in preference.QUESTIONS.values():
        assert question in text


def test_folders_that_do_not_belong_together_are_refused(folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders[0], other)
    (other / "settings.json").write_text(json.dumps({"prompts": [*PROMPTS[:2], "no"]}))
    short = tmp_path / "short"
    shutil.copytree(folders[0], short)
    (short / "0002.png").unlink()
    same = tmp_path / "x" / "base"
    shutil.copytree(folders[0], same)
    for wrong, words in (
        (folders[:1], "two or more"),
        ([folders[0], str(tmp_path)], "no settings.json"),
        ([folders[0], str(other)], "prompt 2 .*'no'.*'two squares & a dot'"),
        ([folders[0], str(short)], "no 0002.png, of 3"),
        ([folders[0], str(same)], "two folders have the name base"),
    ):
        with pytest.raises(ValueError, match=words):
            preference.read_samples(wrong)


def votes_file(path, rows, voter="v", study="s", saved="2024-01-01") -> str:
    votes = [dict(zip(Vote._fields[1:], row, strict=True)) for row in rows]
    content = {"format": preference.FORMAT, "study": study, "voter": voter, "saved": saved}
    path.write_text(json.dumps({**content, "votes": votes}))
    return str(path)


def test_the_newest_answer_counts_and_other_files_are_refused(tmp_path):
    rows = [(0, "aesthetics", "a", "b", "a"), (1, "aesthetics", "a", "b", "tie")]
    new = votes_file(tmp_path / "new", [(0, "aesthetics", "b", "a", "b")], saved="2024-02-01")
    old = votes_file(tmp_path / "old", rows)
    another = votes_file(tmp_path / "another", rows, voter="w")
    found = preference.read_votes([new, old, another])
    assert sorted((v.voter, v.prompt, v.winner) for v in found) == [
        ("v", 0, "b"),
        ("v", 1, "tie"),
        ("w", 0, "a"),
        ("w", 1, "tie"),
    ]
    (tmp_path / "no").write_text("{}")
    for wrong, words in (
        ([old, votes_file(tmp_path / "s2", rows, study="t")], "of study t.* of s"),
        ([str(tmp_path / "no")], "format None"),
        ([votes_file(tmp_path / "w", [(0, "aesthetics", "a", "b", "c")])], "'c' was not shown"),
        ([votes_file(tmp_path / "e", [])], "no votes"),
    ):
        with pytest.raises(ValueError, match=words):
            preference.read_votes(wrong)


def test_wilson_agrees_with_scipy():
    for wins, n in ((0, 5), (3, 10), (70, 100), (7, 7)):
        expected = scipy.stats.binomtest(wins, n).proportion_ci(0.95, "wilson")
        assert preference.wilson(wins, n) == pytest.approx([expected.low, expected.high])


def test_ratings_of_two_are_the_odds_and_of_more_the_maximum_likelihood():
    two = preference.bradley_terry(np.array([[0, 30.0], [10, 0]]))
    assert two[0] - two[1] == pytest.approx(400 * np.log10(3), abs=1e-3)
    assert two.mean() == pytest.approx(1000)
    wins = np.array([[0, 12, 9.5, 3], [5, 0, 8, 2], [4.5, 6, 0, 1], [9, 8, 11, 0]])

    def minus_log_likelihood(strength):
        return sum(
            wins[i, j] * np.logaddexp(0, strength[j] - strength[i])
            for i in range(4)
            for j in range(4)
        )

    best = scipy.optimize.minimize(minus_log_likelihood, np.zeros(4), tol=1e-12).x
    expected = 1000 + 400 / np.log(10) * (best - best.mean())
    np.testing.assert_allclose(preference.bradley_terry(wins), expected, atol=0.01)
    batch = preference.bradley_terry(np.stack([wins, wins.T]))
    np.testing.assert_allclose(batch[0], expected, atol=0.01)


def test_there_are_no_ratings_where_wins_go_one_way_only():
    wins = np.array([[0, 3.0, 2], [1, 0, 4], [0, 0, 0]])
    assert not preference.has_ratings(wins)
    wins[2, 1] = 0.5  # a tie
    assert preference.has_ratings(wins)
    assert preference.has_ratings(np.stack([wins, np.triu(wins)])).tolist() == [True, False]
    votes = [Vote("v", p, "aesthetics", "a", "b", "a") for p in range(5)]
    metrics, settings = preference.score(votes)
    assert metrics["aesthetics/win_rate/a/b"] == 1.0 and "aesthetics/elo/a" not in metrics
    assert "aesthetics/elo" in settings["left_out"]
    votes += [Vote("v", 5, "aesthetics", "b", "a", "b")]
    metrics, settings = preference.score(votes)
    assert metrics["aesthetics/elo/a"] > 1100 and "aesthetics/elo_low/a" not in metrics
    share = int(settings["left_out"]["aesthetics/elo_low, elo_high"].split("%")[0])
    assert 28 <= share <= 39  # (5/6)^6 of the draws have no win of b, three standard deviations


def test_intervals_hold_the_true_rate_and_rating_as_often_as_they_say():
    """95 % of 60 studies are 57; fewer than 51 has a chance of 1 in 200."""
    truth = {"a": 1080.0, "b": 1000.0, "c": 920.0}
    random = np.random.default_rng(0)
    rates = ratings = 0
    for _ in range(60):
        votes = []
        for prompt in range(60):
            for a, b in (("a", "b"), ("c", "a"), ("b", "c")):
                chance = 1 / (1 + 10 ** ((truth[b] - truth[a]) / 400))
                winner = a if random.random() < chance else b
                votes.append(Vote("v", prompt, "typography", a, b, winner))
        found, _ = preference.score(votes, bootstraps=200)
        low, high = (found[f"typography/elo_{side}/a"] for side in ("low", "high"))
        ratings += low <= truth["a"] <= high
        low, high = (found[f"typography/win_rate_{side}/a/b"] for side in ("low", "high"))
        rates += low <= 1 / (1 + 10 ** (-80 / 400)) <= high
    assert rates >= 51 and ratings >= 51, (rates, ratings)


def test_the_evaluator_writes_a_page_or_results(folders, tmp_path):
    text = preference.evaluate(["human"], folders, [], str(tmp_path / "p.html"))
    assert "p.html" in text and (tmp_path / "p.html").exists()
    rows = [(p, "aesthetics", "a", "b", "a" if p % 3 else "tie") for p in range(12)]
    rows += [(12, "aesthetics", "b", "a", "b")]
    votes = votes_file(tmp_path / "votes.json", rows)
    text = preference.evaluate(["human"], [], [votes], str(tmp_path / "r.json"))
    assert "a against b" in text and "of 13 votes" in text
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["human"]["aesthetics/win_rate/a/b"] == pytest.approx(10 / 13)
    assert content["settings"]["human"]["ties"] == 4
    for wrong in (
        (["human", "val_loss"], folders, [], "x"),
        (["human"], folders, [votes], "x"),
        (["human"], [], [], "x"),
        (["human"], folders, [], None),
    ):
        with pytest.raises(ValueError, match="human"):
            preference.evaluate(*wrong)


@pytest.mark.slow
def test_a_browser_shows_asks_remembers_and_downloads(folders, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not browser:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    downloads = tmp_path / "downloads"
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    path = preference.write_page(folders, str(tmp_path / "page.html"), seed=3)
    key = preference.make_page(preference.read_samples(folders), seed=3)["key"]
    _, pairs = json.loads(base64.b64decode(key))
    page = webdriver.Chrome(options, webdriver.ChromeService(driver))
    wait = WebDriverWait(page, 60)

    def text(name: str) -> str:
        return page.find_element("id", name).text

    def press(question: str, choice: str) -> None:
        page.find_element(
            "css selector", f"[data-question={question}][data-choice={choice}]"
        ).click()

    try:
        page.get(f"file://{path}")
        assert text("prompt") == PROMPTS[pairs[0][0]] and text("count") == "pair 1 of 9"
        shown = page.find_element("id", "left")
        wait.until(lambda _: shown.get_property("naturalWidth") == 16)
        for question, choice in zip(preference.QUESTIONS, ("left", "tie", "right"), strict=True):
            press(question, choice)
        wait.until(lambda _: text("count") == "pair 2 of 9")
        press("aesthetics", "right")
        page.refresh()
        assert text("count") == "pair 2 of 9"  # where it was
        pressed = page.find_elements("css selector", "[aria-pressed=true]")
        assert [button.get_attribute("data-choice") for button in pressed] == ["right"]
        page.find_element("id", "next").click()
        page.find_element("css selector", "body").send_keys(Keys.ARROW_LEFT)
        body = page.find_element("css selector", "body").text
        assert not any(name in body for name in ("base", "dpo", "large"))
        page.save_screenshot(str(tmp_path / "page.png"))
        page.find_element("id", "download").click()
        wait.until(lambda _: downloads.exists() and list(downloads.glob("votes-*.json")))
        assert not page.get_log("browser")
    finally:
        page.quit()
    votes = preference.read_votes([str(next(downloads.glob("votes-*.json")))])
    names = ["base", "dpo", "large"]
    sides = [(prompt, names[left], names[right]) for prompt, left, right in pairs]
    assert {(v.prompt, v.left, v.right) for v in votes} == set(sides[:3])
    assert sorted((v.question, v.prompt, v.winner) for v in votes) == sorted(
        [
            ("prompt_following", sides[0][0], sides[0][1]),
            ("aesthetics", sides[0][0], "tie"),
            ("typography", sides[0][0], sides[0][2]),
            ("aesthetics", sides[1][0], sides[1][2]),
            ("prompt_following", sides[2][0], sides[2][1]),
        ]
    )
