// node node_test.mjs < request.json: {root, model, dtype, task, texts} -> the answer, one line of JSON.
import { readFileSync } from "node:fs";
import * as transformers from "@huggingface/transformers";
import { answer } from "./task.mjs";

const request = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(await answer(transformers, { ...request, root: request.root + "/" })));
