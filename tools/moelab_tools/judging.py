"""A model before lm-evaluation-harness: its tasks, and two of our own that need no network, made of held-out text.

Of the extra `lm-eval`; what the filter `decontaminate` asks of it is in that one's own file. The model goes in as
`moelab.as_transformers` makes it and the tokenizer as it is, so dense and MoE models are asked about the same ids.
Sources: EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/models/huggingface.py (HFLM), lm_eval/config/task.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelab.data.corpus import Corpus
from moelab.data.tokenizer import Tokenizer
from moelab.errors import ConfigError, DataError
from moelab.nn.transformer import Transformer
from moelab.seeds import derive_seed
from moelab_plugins.text_filters._lm_eval_tasks import quiet

CONTINUATION, PERPLEXITY = "heldout_continuation", "heldout_perplexity"
OWN = {
    CONTINUATION: "which of four pieces of held-out text goes on with a context; the wrong three are of its domain",
    PERPLEXITY: "perplexity a word and a byte, and bits per byte, of the beginnings of held-out documents",
}
CONTEXT_WORDS, CONTINUATION_WORDS, CHOICES = 60, 8, 4
LONGEST = 2000  # characters of a document that PERPLEXITY reads
MOST_READ = 20_000  # characters of a document that CONTINUATION takes its windows from
MOST = 200  # examples of a task, dealt evenly over the domains
OFFLINE = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "MaxRetryError")


@dataclass(frozen=True)
class Asked:
    """What is put to the model."""

    tasks: Sequence[str]  # names of ours, of lm-eval, or paths of its YAML files
    batch_size: int
    max_length: int  # tokens of a context
    limit: int | None = None  # examples of each task; None: all


@dataclass(frozen=True)
class Score:
    """One number of one task, with lm-eval's standard error where it has one."""

    task: str
    metric: str
    value: float
    error: float | None
    examples: int

    def line(self) -> str:
        """One row: 95 % of repetitions with other examples of the kind would lie within 1.96 standard errors."""
        spread = "" if self.error is None else f" ± {1.96 * self.error:.4f}"
        return f"{self.task:<24} {self.metric:<18} {self.value:>9.4f}{spread:<11} ({self.examples} examples)"


def judge(model: Transformer, tokenizer: Tokenizer, corpus: Corpus, asked: Asked) -> list[Score]:
    """lm-eval's numbers of `model`. Raises ConfigError for an unknown task or a missing package, DataError offline."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks: needs lm-evaluation-harness: pip install 'moelab[lm-eval]'")
    with quiet():
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from moelab import as_transformers, transformers_tokenizer

        known = TaskManager(include_defaults=any(name not in OWN for name in asked.tasks))
        tasks = [_task(name, corpus, tokenizer, known) for name in dict.fromkeys(asked.tasks)]
        judged = HFLM(
            pretrained=as_transformers(model),
            tokenizer=transformers_tokenizer(tokenizer),
            batch_size=asked.batch_size,
            max_length=asked.max_length,
        )
        try:
            found = simple_evaluate(
                judged, tasks=tasks, task_manager=known, limit=asked.limit, bootstrap_iters=1000, log_samples=False
            )
        except Exception as error:
            raise _told(error) from error
    assert found is not None
    return _scores(found)


def continuations(corpus: Corpus, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Contexts with four continuations each, the same ones for every model of this tokenizer and corpus.

    Raises DataError where the held-out text has too few documents that are long enough.
    """
    window = CONTEXT_WORDS + CONTINUATION_WORDS
    found = []  # (domain, document, context, what follows it)
    for document, (domain, text) in enumerate(_documents(corpus, tokenizer, MOST_READ)):
        words = text.split()
        for begin in range(0, len(words) - window + 1, window):
            middle = begin + CONTEXT_WORDS
            parts = (" ".join(words[begin:middle]), " ".join(words[middle : begin + window]))
            found.append((domain, document, *parts))
    examples = []
    for index, (domain, document, context, right) in enumerate(found):
        others = sorted({piece for d, other, _, piece in found if d == domain and other != document} - {right})
        if len(others) < CHOICES - 1:
            continue
        start = derive_seed(index, "continuation") % len(others)
        wrong = [others[(start + step) % len(others)] for step in range(CHOICES - 1)]
        place = derive_seed(index, "place") % CHOICES
        examples.append({"context": context, "choices": [*wrong[:place], right, *wrong[place:]], "right": place})
    if not examples:
        raise DataError(
            f"--tasks {CONTINUATION}: needs held-out documents of one domain with {window} words each, two at least; "
            "hold out more text, or take --tasks heldout_perplexity"
        )
    step = -(-len(examples) // MOST)  # from all over the text, not its beginning alone
    return examples[::step]


def _documents(corpus: Corpus, tokenizer: Tokenizer, longest: int) -> list[tuple[str, str]]:
    """(domain, text) of held-out documents, one of each domain in turn."""
    stream = corpus.validation
    by_domain: dict[str, list[tuple[str, str]]] = {}
    for index, domain_id in enumerate(stream.document_domain):
        begin, end = int(stream.document_starts[index]), int(stream.document_starts[index + 1])
        domain = corpus.domains[int(domain_id)]
        if len(by_domain.setdefault(domain, [])) < MOST:
            text = tokenizer.decode(stream.tokens[begin : min(end - 1, begin + longest)])
            by_domain[domain].append((domain, text[:longest]))
    rows = max(map(len, by_domain.values()), default=0)
    return [found[row] for row in range(rows) for found in by_domain.values() if row < len(found)]


def _task(name: str, corpus: Corpus, tokenizer: Tokenizer, known: Any) -> Any:
    """What simple_evaluate takes for a name: a config of our own task, or lm-eval's name or file."""
    if name not in OWN:
        if name not in known.all_tasks and not name.endswith((".yaml", ".yml")):
            raise ConfigError(
                f"--tasks: no task '{name}'; of our own there are {' and '.join(OWN)}, lm-eval's are listed by "
                "`lm-eval ls tasks`, and a path of one of its YAML files will do"
            )
        return name
    import datasets

    if name == CONTINUATION:
        rows = continuations(corpus, tokenizer)
        shape = {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "right",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        }
    else:
        rows = [{"page": text} for _, text in _documents(corpus, tokenizer, LONGEST)[:MOST] if text.strip()]
        shape = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
    return {
        "task": name,
        "test_split": "test",
        "num_fewshot": 0,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        **shape,
    }


def _scores(found: Any) -> list[Score]:
    scores = []
    for task, numbers in found["results"].items():
        count = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        for key, value in numbers.items():
            metric, _, suffix = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{suffix}")
            scores.append(Score(task, metric, value, float(error) if isinstance(error, float) else None, count))
    return scores


def _told(error: BaseException) -> BaseException:
    """A task that can't reach its data says so in one line; anything else is told as it is."""
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ in OFFLINE:
            return DataError(
                "--tasks: the data of a task lie on the Hugging Face hub, and it can't be reached from here "
                f"({type(chain).__name__}); run it once where there is a network and bring the cache along, or take "
                f"{' or '.join(OWN)}"
            )
        chain = chain.__cause__ or chain.__context__
    return error
