"""Train a small OPT model and its tokenizer from text files: the recipe behind the embedded `opt-mini`.

Why: `opt-mini` (8.5 M parameters, 17 MB) ships so that every example and test runs offline on a *trained* model; the
figures of random weights say nothing about compression. This script is how to make its like, or one for your language.

`opt-mini` has the defaults below: 2930 steps of 256 x 512 tokens, 384 M in all, on 361 MB of English Wikipedia plus
the topics of `pydoc_data.topics` that the project does not hold out for evaluation. On one GPU:

    python scripts/train_demo_model.py wikipedia.txt pydoc.txt --output opt-mini

Its larger sister `opt-small` (23.6 M parameters, benchmarks only) saw 416 M tokens of the same text:

    python scripts/train_demo_model.py wikipedia.txt pydoc.txt --output opt-small --hidden_size 512 --layers 6 \
        --heads 8 --positions 1024 --batch_size 32 --learning_rate 1e-3 --steps 3174

Left out: several GPUs, checkpoints and resuming, a validation set; measure the result with this package.
"""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS, END = ["<s>", "<pad>", "</s>", "<unk>"], 2  # a token's place is its id, as in OPT


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults are those of `opt-mini`."""
    parser = argparse.ArgumentParser(description="Train a small OPT model and its tokenizer from text files.")
    parser.add_argument("text", nargs="+", type=Path, help="UTF-8 text files, joined by a blank line")
    parser.add_argument("--output", type=Path, required=True, help="a new or empty folder for model and tokenizer")
    parser.add_argument("--steps", type=int, default=2930, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=64, help="windows in one forward pass")
    parser.add_argument("--accumulate", type=int, default=4, help="forward passes in one optimizer step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="peak, after the warm-up")
    parser.add_argument("--hidden_size", type=int, default=256, help="the feed-forward part is four times as wide")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512, help="tokens in one window")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens in the vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    precisions = ["bf16-mixed", "bf16-true", "32-true"]
    parser.add_argument("--precision", choices=precisions, default=precisions[0], help="32-true is for a CPU")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise one ValueError that lists every argument that breaks its rule."""
    smallest = dict.fromkeys(["steps", "batch_size", "accumulate", "hidden_size", "layers", "heads"], 1)
    smallest |= {"positions": 2, "vocab": 4 + 256}  # something to predict; the special tokens and every byte
    offenders = [f"text: must be a file, got {path}" for path in args.text if not path.is_file()]
    offenders += [
        f"--{name}: must be at least {least}, got {getattr(args, name)}"
        for name, least in smallest.items()
        if getattr(args, name) < least
    ]
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        offenders.append(f"--output: must be a new or empty folder, got {args.output}")
    if not 0 < args.learning_rate < math.inf:
        offenders.append(f"--learning_rate: must be positive and finite, got {args.learning_rate}")
    if args.heads >= 1 and args.hidden_size % args.heads:
        offenders.append(f"--hidden_size: must be a multiple of --heads {args.heads}, got {args.hidden_size}")
    if offenders:
        raise ValueError("\n".join(["bad arguments:", *offenders]))


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    r"""Cut a text into pieces of about `size` characters whose tokens, joined, are those of the whole text.

    One call for the whole text takes some 600 bytes of memory a token (measured), tens of GB for that of `opt-mini`.
    GPT-2's word pattern already parts the last newline before a word from what precedes it: cutting there is free.

    >>> list(pieces("one\n\n\ntwo\nthree", size=1))
    ['one\n\n', '\ntwo', '\nthree']
    """
    start, last_newline = 0, re.compile(r"\n(?=\S)")
    while found := last_newline.search(text, start + size):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly `vocab` tokens that puts `</s>` in front, as OPT's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", END)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(text), trainer)
    if (filled := tokenizer.get_vocab_size()) != vocab:
        raise ValueError(f"--vocab: must be at most {filled}, all that this text can fill, got {vocab}")
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Tokenize a text whole, `</s>` once in front: int32 `[tokens]`."""
    ids = chain([[END]], (tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces(text)))
    return torch.cat([torch.tensor(part, dtype=torch.int32) for part in ids])


class RandomWindows:
    """The batches of a whole run, in order: windows of `positions` tokens that start anywhere in the text.

    A plain iterable, not a DataLoader: slicing a tensor in memory is too cheap to give to worker processes.
    """

    def __init__(self, tokens: torch.Tensor, positions: int, batches: int, batch_size: int, seed: int) -> None:
        if len(tokens) < positions:
            raise ValueError(f"--positions: must be at most the {len(tokens)} tokens of the text, got {positions}")
        generator = torch.Generator().manual_seed(seed)
        self.windows = tokens.unfold(0, positions, 1)  # [tokens - positions + 1, positions], a view
        self.chosen = torch.randint(len(self.windows), (batches, batch_size), generator=generator)

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for row in self.chosen:
            yield self.windows[row].long()  # [batch_size, positions]


def learning_rate_factor(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: linear warm-up over the first 2 % of the steps times a cosine to zero."""
    warm_up = max(1, steps // 50)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


class PretrainingModule(pl.LightningModule):
    """Next-token cross-entropy with AdamW; weight decay pulls on the matrices of the linears and on nothing else."""

    def __init__(self, model: OPTForCausalLM, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.model, self.learning_rate, self.steps = model, learning_rate, steps

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy of a batch of token windows, int64 `[batch_size, positions]`."""
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW (0.9, 0.95) and the schedule, one move each optimizer step."""
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if p.ndim == 2 and "embed" not in name]  # the tied head is an embedding
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_model(args: argparse.Namespace) -> OPTForCausalLM:
    """Make an untrained OPT with tied embeddings and no dropout; the global random state stays as it was."""
    config = OPTConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden_size,
        word_embed_proj_dim=args.hidden_size,
        ffn_dim=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.positions,
        dropout=0.0,
    )  # whose ids of <pad> and </s> are those above by default
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return OPTForCausalLM(config)


def save(model: OPTForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write fp16 weights, configuration and tokenizer, refusing weights that are not finite in fp16."""
    model = model.to(device="cpu", dtype=torch.float16).eval()
    offenders = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if offenders:
        raise ValueError(f"the training diverged, try a lower --learning_rate; not finite: {', '.join(offenders)}")
    model.save_pretrained(output)
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    positions = model.config.max_position_embeddings
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions, **names).save_pretrained(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, tokenize, train, save."""
    args = parse_arguments(argv)
    check_arguments(args)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.text)
    tokenizer = train_tokenizer(text, args.vocab)
    tokens = tokenize(tokenizer, text)
    windows = RandomWindows(tokens, args.positions, args.steps * args.accumulate, args.batch_size, args.seed)
    model = build_model(args)
    trainer = pl.Trainer(
        max_epochs=1,
        devices=1,
        precision=args.precision,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,  # it warns that it cannot size bf16-mixed
    )
    trainer.fit(PretrainingModule(model, args.learning_rate, args.steps), windows)
    save(model, tokenizer, args.output)
    print(f"{len(tokens):,} tokens of text, {model.num_parameters():,} parameters, saved in {args.output}")


if __name__ == "__main__":
    main()
