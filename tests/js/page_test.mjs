// node page_test.mjs < request.json: {page: folder or file of a built page, query, panel, shot, dark, width} ->
// what the page shows, one line of JSON; a screenshot where `shot` names a file.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { open } from "./browser.mjs";
import { serve } from "./server.mjs";

const { page: built, query, panel = 0, shot, dark = false, width = 1000 } = JSON.parse(readFileSync(0, "utf8"));
const server = built.endsWith(".html") ? null : await serve({ "/": built });
const url = server ? `${server.url}/` : pathToFileURL(built).href;
const { browser, page, problems } = await open(url, {
  viewport: { width, height: 900 },
  deviceScaleFactor: shot ? 2 : 1,
  colorScheme: dark ? "dark" : "light",
  reducedMotion: "reduce",
});
try {
  await page.waitForFunction(() => document.body.dataset.state, null, { timeout: 120_000 });
  const text = (selector) => page.locator(selector).allInnerTexts();
  const state = await page.evaluate(() => document.body.dataset.state);
  const result = { state, status: (await text("#status"))[0] };
  if (state === "ready") {
    if (await page.locator("#tabs button").count()) await page.locator("#tabs button").nth(panel).click();
    const answers = `#panel-${panel} :is(.answers li, .words span)`;
    await page.locator(`#text-${panel}`).pressSequentially(query);
    // the last answer is of the whole query once nothing changes any more
    await page.waitForFunction((a) => document.querySelectorAll(a).length, answers, { timeout: 60_000 });
    let before = "";
    for (let now = null; now !== before; ) {
      before = now;
      await page.waitForTimeout(400);
      now = (await text(answers)).join("\n");
    }
    result.answers = await text(answers);
    result.figures = Object.fromEntries(
      await page.locator(".figures div").evaluateAll((all) => all.map((x) => x.innerText.split("\n"))),
    );
    result.overflow = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
    result.unnamed = await page.evaluate(
      () => [...document.querySelectorAll("input, textarea, button")].filter((x) => !x.labels?.length && !x.textContent).length,
    );
    result.focused = await page.evaluate(() => document.activeElement.id);
  }
  if (shot) await page.screenshot({ path: shot, fullPage: true });
  console.log(JSON.stringify({ ...result, problems }));
} catch (error) {
  console.log(JSON.stringify({ error: error.message, problems }));
  process.exitCode = 1;
} finally {
  await browser.close();
  server?.close();
}
