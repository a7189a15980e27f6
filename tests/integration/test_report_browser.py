"""The report in a real browser: it renders, unfolds, filters, and logs no error."""

from __future__ import annotations

import shutil

import pytest

from sdar_verl.report.document import write_report
from tests.support.recorded_run import write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")


@pytest.fixture(scope="module")
def browser():
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser starts here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "run"))[0]


def opened(browser, path, width=1280, scheme="light"):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True).new_page()
    page.faults = []
    page.on(
        "console", lambda message: page.faults.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(f"file://{path}")
    page.wait_for_selector(".turn")
    page.wait_for_function("[...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('svg'))")
    return page


@pytest.fixture
def page(browser, report):
    page = opened(browser, report)
    yield page
    assert page.faults == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_window(browser, report, width, scheme):
    page = opened(browser, report, width, scheme)
    assert page.locator(".chart").count() == page.locator(".chart:has(svg)").count() == 12
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.faults == []
    page.context.close()


def test_a_click_opens_an_episode_and_unfolds_what_the_teacher_sees(page):
    page.locator(".list li").nth(3).click()
    page.wait_for_selector(".column[data-episode='3']")
    fold = page.locator("details.context").first
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").inner_text() == "Apples are usually in the fridge. </script><b>bold</b>"


def test_a_conversation_of_a_recipe_of_verls_has_roles(browser, tmp_path):
    """The environments' turns have actions, and no roles."""
    loop = "actor_rollout_ref.rollout.agent.default_agent_loop"
    for name, roles, actions in (("tool_agent", ["user", "assistant", "tool"], 0), ("sdar_agent", [], 3)):
        page = opened(browser, write_report(write_run(tmp_path / name, **{loop: name}))[0])
        first = page.locator(".column .turn").first.locator(".role").all_inner_texts()
        assert [role.strip().lower() for role in first] == roles
        assert page.locator(".column .turn .action").count() == actions
        assert page.faults == []
        page.context.close()


def test_filters_and_their_count(page):
    def shown():
        return page.locator(".list li").count()

    assert shown() == 36
    page.select_option("#f-success", "1")
    assert shown() == 18 and "18 of 36" in page.locator(".count").inner_text()
    page.select_option("#f-step", "4")
    page.select_option("#f-type", "look_at_obj_in_light")
    assert shown() == 1
    page.wait_for_selector(".column h3 .mark.yes")
    page.fill("#f-words", "no such word")
    assert shown() == 0 and "No episode passes" in page.locator(".detail").inner_text()
    page.fill("#f-words", "")
    page.wait_for_selector(".turn")


def test_hovering_a_token_shows_its_numbers(page):
    page.locator(".token").first.hover()
    text = page.locator("#tip").inner_text()
    assert "gap" in text and "student" in text and "nats" in text and "-0.500" in text


def test_colours_follow_the_sign_of_the_gap_and_the_key_switches_to_the_gate(page):
    colour = "getComputedStyle(document.querySelector('.token')).backgroundColor"
    gap = page.evaluate("REPORT.viewer.index[0].gap")
    assert gap < 0
    before = page.evaluate(colour)
    page.evaluate("document.querySelector('#episodes').scrollIntoView()")
    page.keyboard.press("g")
    assert page.locator("#colour").inner_text() == "colour: gate"
    assert page.evaluate(colour) != before


def test_turns_are_ranked_by_endorsement(page):
    values = [float(text.replace("−", "-")) for text in page.locator(".ranks .v").all_inner_texts()]
    assert len(values) == 3 and values == sorted(values, reverse=True)


def test_two_episodes_of_a_group_stand_side_by_side(page):
    page.evaluate("document.querySelector('#episodes').scrollIntoView()")
    page.keyboard.press("s")
    page.wait_for_selector(".columns.n2")
    columns = page.locator(".column")
    assert [columns.nth(i).get_attribute("data-episode") for i in range(2)] == ["0", "1"]
    boxes = [columns.nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


def test_keys_walk_through_episodes_and_turns(page):
    page.evaluate("document.querySelector('#episodes').scrollIntoView()")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".column[data-episode='1']")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator(".turn.current").get_attribute("data-turn") == "1"
    page.keyboard.press("t")
    assert page.locator("details.context[open]").count() == 3
    page.keyboard.press("/")
    page.keyboard.type("task-1")
    assert page.locator(".list li").count() == 18


def test_the_theme_button_wins_over_the_system(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.locator("#theme").click()
    assert page.evaluate(background) != light
    page.locator("#theme").click()
    assert page.evaluate(background) == light


def test_a_script_from_a_text_is_shown_and_never_run(browser, report, tmp_path):
    forged = tmp_path / "forged.html"
    text = report.read_text(encoding="utf-8")
    # Should an escape ever be forgotten: the page's policy still runs no script but its own.
    forged.write_text(text.replace("<main", "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><main"))
    page = opened(browser, forged)
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in fault for fault in page.faults)
    page.context.close()
    page = opened(browser, report)
    assert "<script>alert(1)</script>" in page.locator(".list").inner_text()
    assert page.faults == []
