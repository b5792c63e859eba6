"""The kinds of delivered models, and everything that the library knows about each. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a delivered model is for."""

    method: str  # of `runtime.delivery.Delivery`
    architecture: str  # transformers' class
    pipeline: str  # Hugging Face's pipeline tag
    title: str  # in the model card
    example: str  # a call, in the model card
    output: str = "logits"  # the graph's output that the runtime reads
    labelled: bool = False  # config.json names a label for each column of the output


# A manifest's "task" -> its kind
KINDS = {
    "embedding": Kind(
        method="embed",
        architecture="BertModel",
        pipeline="sentence-similarity",
        title="A sentence embedder",
        example='embed(["a text"])  # [1, {dimension}] float32',
        output="sentence_embedding",
    ),
    "classification": Kind(
        method="classify",
        architecture="BertForSequenceClassification",
        pipeline="text-classification",
        title="A text classifier",
        example='classify(["a text"])  # labels, scores [1, labels]',
        labelled=True,
    ),
    "tokens": Kind(
        method="label_tokens",
        architecture="BertForTokenClassification",
        pipeline="token-classification",
        title="A tagger of words",
        example='label_tokens(["a text"])  # word, label, score',
        labelled=True,
    ),
    "fill-mask": Kind(
        method="fill_mask",
        architecture="BertForMaskedLM",
        pipeline="fill-mask",
        title="A masked language model",
        example='fill_mask(["a [MASK]"])  # piece, score, text',
    ),
}
