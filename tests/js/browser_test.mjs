// node browser_test.mjs < request.json: as node_test.mjs, in headless Chromium from a local static server.
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { open } from "./browser.mjs";
import { serve } from "./server.mjs";
import { answer } from "./task.mjs";

const here = dirname(fileURLToPath(import.meta.url));
const request = JSON.parse(readFileSync(0, "utf8"));
const server = await serve({ "/models": request.root, "/": here });
const { browser, page, problems } = await open(`${server.url}/transformers.html?build=${request.build}`);
try {
  await page.waitForFunction(() => window.transformers, null, { timeout: 60_000 });
  const result = await page.evaluate(
    async ([code, request]) => {
      transformers.env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
      transformers.env.backends.onnx.wasm.numThreads = 1;
      return await new Function(`return ${code.replace(/^export /, "")}`)()(transformers, request);
    },
    [answer.toString(), { ...request, root: "/models/" }],
  );
  console.log(JSON.stringify({ answer: result, problems }));
} catch (error) {
  console.log(JSON.stringify({ error: error.message, problems }));
  process.exitCode = 1;
} finally {
  await browser.close();
  server.close();
}
