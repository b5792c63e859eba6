// What a delivery answers in transformers.js: runs in Node and, as text, in the browser's page.
export async function answer(transformers, { root, model, dtype, task, texts }) {
  const { env, pipeline, AutoModel, AutoTokenizer } = transformers;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = root;
  env.useBrowserCache = false;
  const options = { dtype, device: typeof window === "undefined" ? "cpu" : "wasm" };
  if (task === "ids") {
    const tokenizer = await AutoTokenizer.from_pretrained(model);
    return texts.map((text) => tokenizer.encode(text)); // JSON writes null for an undefined id
  }
  if (task !== "embedding") {
    const run = await pipeline({ classification: "text-classification", tokens: "token-classification" }[task] ?? task, model, options);
    return await run(texts, task === "classification" ? { top_k: null } : {});
  }
  const run = await pipeline("feature-extraction", model, options);
  const pooled = await run(texts, { pooling: "mean", normalize: true });
  const encoder = await AutoModel.from_pretrained(model, options);
  const tokenizer = await AutoTokenizer.from_pretrained(model);
  const { sentence_embedding } = await encoder(await tokenizer(texts, { padding: true, truncation: true }));
  return { pipeline: pooled.tolist(), sentence_embedding: sentence_embedding.tolist() };
}
