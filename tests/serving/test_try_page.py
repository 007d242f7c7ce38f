"""The server's page in a real browser: Chromium by playwright, where a machine has both."""

from __future__ import annotations

import os
import shutil

import pytest
import server_process

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page's test needs the package playwright, and Chromium"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome on this machine to try the page in"
)
# Chromium refuses its sandbox to the system's administrator, whom CI often is.
ARGUMENTS = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
SECONDS = 60_000  # of a wait, in ms


@pytest.fixture(scope="module")
def address(trained):
    options = ["--max_items=2", "--batch_new_users=1", "--max_k=8", "--k=3"]
    with server_process.started(trained("mf").workdir, *options) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as library:
        yield library.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)


@pytest.fixture
def page(address, browser):
    """The page, ready; at the end nothing may have failed in it or left its server."""
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((address, "data:")) else problems.append(request.url)
        ),
    )
    page.goto(address)
    playwright.expect(page.locator("#health")).to_contain_text("ready: mf on world, 24 users")
    yield page
    page.close()
    assert problems == []


def _rows(page, count: int) -> list[list[str]]:
    """Cells of the list's rows."""
    rows = page.locator("#list tbody tr")
    playwright.expect(rows).to_have_count(count, timeout=SECONDS)
    return [row.locator("td").all_inner_texts() for row in rows.all()]


def test_a_known_users_list_is_shown_with_titles_by_keyboard_alone(page, trained):
    expected = trained("mf").recommend(["u5"], k=4)
    page.get_by_label("Items", exact=True).fill("4")
    page.get_by_label("User id").focus()
    page.keyboard.type("u5")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # on the button
    assert _rows(page, 4) == [
        [str(rank), f"item {item[1:]}", item, f"{score:.3f}"]
        for rank, item, score in zip(
            range(1, 5), expected.items[0], expected.scores[0], strict=True
        )
    ]
    assert page.locator("#list caption").inner_text() == "For user u5"


def test_an_unknown_user_is_an_error_in_words(page):
    page.get_by_label("User id").fill("<b>nobody</b>")
    page.get_by_role("button", name="Recommend", exact=True).click()
    message = page.locator("#message.error")
    playwright.expect(message).to_contain_text("unknown user '<b>nobody</b>' (1 of 1)")
    assert not page.locator("#list").is_visible()


def test_a_new_user_is_made_of_items_found_by_title(page, trained):
    expected = trained("mf").fold_in({"x": ["i17", "i4"]}).recommend(k=8).items[0]
    recommend = page.get_by_role("button", name="Recommend for these items")
    assert recommend.is_disabled()
    page.get_by_label("Items", exact=True).fill("8")
    for title in ("item 17", "item 4", "item 3"):
        page.get_by_label("Find items by title or id").fill(title)
        page.keyboard.press("Enter")
        page.get_by_role("button", name=f"Add {title} (i{title[5:]})").click()
    recommend.click()
    playwright.expect(page.locator("#message.error")).to_contain_text("3 of them")
    page.get_by_role("button", name="Remove item 3 (i3)").click()
    recommend.click()
    assert [row[2] for row in _rows(page, 8)] == expected


def test_every_control_has_a_name(page):
    page.get_by_label("Find items by title or id").fill("item 1")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Add item 19 (i19)").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, button")].filter((control) =>
            !(control.labels?.length || control.getAttribute("aria-label") ||
              control.textContent.trim())).map((control) => control.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
