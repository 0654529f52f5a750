"""What is trained of a loaded expert: an adapter, all of its weights, or a concept's embedding."""

from torch import nn

from shared.concept import text_key
from shared.store_read import StoreReader
from train.adapter import add_adapter
from train.embedding import OutputConcept, first_rows
from train.model import Model, TextBank
from train.optim import EMBEDDING
from train.run import Run
from train.sample import ensure_texts

Trained = tuple[TextBank, dict[str, nn.Parameter]]


def make_trained(model: Model, run: Run, seed: int, reader: StoreReader, texts: list[str]) -> Trained:
    """(captions for the model, trained parameters by name). `seed`: of an adapter's start; `texts`: all captions."""
    config = run.config
    if config.training_method == "EMBEDDING":
        return with_concept(model, run, texts)
    if config.training_method == "FINE_TUNE":
        model.transformer.requires_grad_(True)
        return TextBank(model, reader, trained=True), dict(model.transformer.named_parameters())
    trained = add_adapter(model.transformer, config, seed)
    model.transformer.train(config.lora_dropout > 0)
    return TextBank(model, reader), trained


def with_concept(model: Model, run: Run, texts: list[str]) -> Trained:
    """Captions whose placeholder is vectors to be learned, of every text in the store."""
    settings, reader = run.config.embedding, ensure_texts(texts, run)
    found = [reader.text(text_key(text, settings)) for text in dict.fromkeys(texts)]
    rows_nd = nn.Parameter(first_rows(found, settings, run.spec.text_dim).to(model.device))
    return TextBank(model, reader, OutputConcept(rows_nd)), {EMBEDDING: rows_nd}
