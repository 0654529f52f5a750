"""What is trained of a loaded expert: an adapter, all of its weights, or a concept's embedding."""

from torch import nn

from shared.store_read import StoreReader
from train.adapter import add_adapter
from train.embedding import initial_texts, make_concept
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
    """Captions whose placeholder is rows to be learned; texts with the initial text in its place are embedded first."""
    settings = run.config.embedding
    replaced = initial_texts(texts, settings)
    reader = ensure_texts([*replaced.values(), settings.initial_text], run)
    concept = make_concept(replaced, settings, reader, model.device)
    return TextBank(model, reader, concept), {EMBEDDING: concept.rows_nd}
