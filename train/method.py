"""What is trained of a loaded expert: an adapter, all of its weights, with the text encoder's, or a concept."""

from torch import nn

from shared.concept import text_key
from shared.store_read import StoreReader
from train.adapter import add_adapter
from train.embedding import InputConcept, OutputConcept, first_rows, stored
from train.flow import wider
from train.model import Model, TextBank
from train.optim import EMBEDDING
from train.run import Run
from train.sample import ensure_texts
from train.text_encoder import load_encoder, needs_encoder

Trained = tuple[TextBank, dict[str, nn.Parameter]]


def make_trained(model: Model, run: Run, seed: int, reader: StoreReader, texts: list[str]) -> Trained:
    """(captions for the model, trained parameters by name). `seed`: of an adapter's start; `texts`: all captions."""
    config = run.config
    if config.training_method == "EMBEDDING":
        return with_concept(model, run, texts)
    if config.training_method == "FINE_TUNE":
        model.transformer.requires_grad_(config.transformer.train)
        encoder = load_encoder(run.spec, config, model.device) if needs_encoder(config) else None
        weights = dict(model.transformer.named_parameters()) if config.transformer.train else {}
        weights |= {} if encoder is None else encoder.parameters()
        return TextBank(model, reader, encoder, config.transformer.train), weights
    trained = add_adapter(model.transformer, config, seed)
    model.transformer.train(config.lora_dropout > 0)
    return TextBank(model, reader), trained


def with_concept(model: Model, run: Run, texts: list[str]) -> Trained:
    """Captions whose placeholder is vectors to be learned, of every text in the store."""
    settings, reader = run.config.embedding, ensure_texts(texts, run)
    found = [reader.text(text_key(text, settings)) for text in dict.fromkeys(texts)]
    encoder = load_encoder(run.spec, run.config, model.device) if needs_encoder(run.config) else None
    values = stored if encoder is None else encoder.vectors
    rows_nd = first_rows(found, settings, run.spec.text_dim, values).to(model.device, wider(model.dtype))
    learned = nn.Parameter(rows_nd)
    concept = OutputConcept(learned) if encoder is None else InputConcept(learned, encoder)
    return TextBank(model, reader, concept), {EMBEDDING: learned}
