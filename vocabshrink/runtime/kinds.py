"""The kinds of delivered models, and what the library must know about each. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a delivered model is for."""

    method: str  # of `runtime.delivery.Delivery`
    architecture: str  # transformers' class
    output: str = "logits"  # the graph's output that the runtime reads
    labelled: bool = False  # config.json names a label for each column of the output


# A manifest's "task" -> its kind; what the model card says of each stands in its template
KINDS = {
    "embedding": Kind("embed", "BertModel", output="sentence_embedding"),
    "classification": Kind("classify", "BertForSequenceClassification", labelled=True),
    "tokens": Kind("label_tokens", "BertForTokenClassification", labelled=True),
    "fill-mask": Kind("fill_mask", "BertForMaskedLM"),
}
