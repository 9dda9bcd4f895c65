"""The model shape that a run's settings lead to. Importable without torch."""

from gpt2box.config.schema import MODEL_SHAPES, Config
from gpt2box.data.dataset import open_dataset
from gpt2box.data.pretrained import load_shape, load_weights_tokenizer, pretrained_folder, resolve_shape
from gpt2box.data.tokenizer import Tokenizer
from gpt2box.errors import Gpt2boxError
from gpt2box.model.shape import GPT2_VOCAB_SIZE, ModelShape
from gpt2box.utils.paths import dataset_dir, model_dir

CHAR_VOCAB_SIZE = 100  # about the number of characters in an English text


def resolve_model_shape(config: Config) -> ModelShape:
    """Return the model's shape, from the settings or from the weights that the run starts from.

    Neither the dataset nor published weights need to be present.

    Raises BadInput: Settings, weights and dataset do not fit, as in training.
    """
    tokenizer = load_dataset_tokenizer(config)
    if config.init_from == "scratch":
        default = CHAR_VOCAB_SIZE if config.dataset.endswith("-char") else GPT2_VOCAB_SIZE
        vocab_size = tokenizer.vocab_size if tokenizer else default
        return ModelShape(**config.shape(), block_size=config.block_size, vocab_size=vocab_size, bias=config.bias)
    if config.init_from in MODEL_SHAPES:
        folder = model_dir(config.init_from)
        stored = ModelShape(**MODEL_SHAPES[config.init_from], block_size=1024, vocab_size=GPT2_VOCAB_SIZE, bias=True)
    else:
        folder = pretrained_folder(config.init_from)
        stored = load_shape(folder)
    own_tokenizer = load_weights_tokenizer(folder, stored, tokenizer) if tokenizer else None
    return resolve_shape(config, stored, config.init_from, tokenizer, own_tokenizer)


def load_dataset_tokenizer(config: Config) -> Tokenizer | None:
    """Load the dataset's tokenizer; None if the dataset has not been prepared yet."""
    try:
        return open_dataset(dataset_dir(config.dataset)).tokenizer
    except Gpt2boxError:
        return None
