"""Trainers of TRL on tiny random models, with a tokenizer and data sets that are made here, and what they log.

Their truth is the same trainer in fp64, with log-probabilities and divergences of all logits in plain torch.
"""

import collections
import contextlib
import gc
import importlib
import io
import random
import warnings

import torch
from transformers_models import TOKENS, transformers
from transformers_training import in_fp64

V = 19  # some tokens are the most likely ones
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 3))]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
TIMES = ("time", "runtime", "per_second")  # of what is logged, what no two runs share
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer(size=V):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*WORDS, *(f"w{i}" for i in range(V - 3, size - 3))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    made = transformers().PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = CHAT
    return made


def model(kind="Llama", seed=0, **config):
    """A causal model of this family whose logits are spread."""
    torch.manual_seed(seed)
    library = transformers()
    sizes = {"vocab_size": V, "num_key_value_heads": 2, "tie_word_embeddings": False}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    options = TOKENS | SIZES | sizes | tokens | config
    made = getattr(library, f"{kind}ForCausalLM")(getattr(library, f"{kind}Config")(**options))
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(8)
    return made


def saved(folder, made):
    """The folder of a model and its tokenizer: some trainers load a second one from where the first came from."""
    made.save_pretrained(folder)
    tokenizer(made.config.get_text_config().vocab_size).save_pretrained(folder)
    return str(folder)


def text(words, seed):
    drawn = random.Random(seed)
    return " ".join(f"w{drawn.randrange(V - 3)}" for _ in range(words))


def rows(count=8, prompts=(2, 3, 4), answers=(3, 4, 5, 6)):
    """Prompts and answers of so many words in turn, half of them good ones."""
    good = [" " + text(answers[i % len(answers)], 100 + i) for i in range(count)]
    bad = [" " + text(answers[-1 - i % len(answers)], 200 + i) for i in range(count)]
    prompts = [text(prompts[i % len(prompts)], i) for i in range(count)]
    return [
        {"prompt": prompts[i], "completion": good[i], "chosen": good[i], "rejected": bad[i], "label": i % 2 == 0}
        for i in range(count)
    ]


def reward(completions, **_):
    """A program that a model could please."""
    return [sum(word < "w3" for word in answer.split()) / (1 + len(answer.split())) for answer in completions]


def answering(made, length, first=1):
    """Give a model a generate that draws ids from `first` on, whatever its dtype and head; 1 ends an answer."""
    drawn = torch.Generator().manual_seed(5)

    def generate(input_ids, return_dict_in_generate=False, **_):
        new = torch.randint(first, V, (len(input_ids), length), generator=drawn)
        whole = torch.cat([input_ids, new.to(input_ids)], dim=1)
        return collections.namedtuple("Generated", "sequences")(whole) if return_dict_in_generate else whole

    made.generate = generate


COLUMNS = {
    "SFT": ("prompt", "completion"),
    "DPO": ("prompt", "chosen", "rejected"),
    "KTO": ("prompt", "completion", "label"),
    "GRPO": ("prompt",),
    "RLOO": ("prompt",),
    "GMPO": ("prompt",),
    "Distillation": ("prompt",),
    "GKD": ("messages",),
}
ONLINE = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 4}
OPTIONS = {
    "DPO": {"beta": 0.5},
    "KTO": {"beta": 0.5, "per_device_train_batch_size": 4},
    "GRPO": ONLINE | {"beta": 0.1, "num_iterations": 2, "epsilon": 0.05},
    "RLOO": ONLINE | {"beta": 0.1, "num_iterations": 2},
    "GMPO": ONLINE | {"beta": 0.1, "num_iterations": 2},
    "Distillation": {"max_completion_length": 6, "per_device_train_batch_size": 4},
    "GKD": {"max_new_tokens": 6, "lmbda": 0.5},
}
REWARDED = ("GRPO", "RLOO", "GMPO")
TEACHERS = ("Distillation", "GKD")
EXPERIMENTAL = ("GKD", "GMPO")


def trainer(name, folder, output, *, count=8, data=None, **changed):
    """One of TRL's trainers of the model in a folder, that takes plain steps of gradient descent."""
    import trl
    from datasets import Dataset

    home = importlib.import_module(f"trl.experimental.{name.lower()}") if name in EXPERIMENTAL else trl
    options = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    options |= OPTIONS.get(name, {}) | changed
    arguments = ("peft_config", "eval_dataset", "compute_metrics")
    more = {key: options.pop(key) for key in arguments if key in options}
    data = rows(count) if data is None else data
    if name == "GKD":
        roles = ("user", "prompt"), ("assistant", "completion")
        data = [{"messages": [{"role": role, "content": row[column]} for role, column in roles]} for row in data]
    data = Dataset.from_list([{column: row[column] for column in COLUMNS[name]} for row in data])
    if name in TEACHERS:
        more["teacher_model"] = model_of(folder)
        with torch.no_grad():
            more["teacher_model"].get_output_embeddings().weight.mul_(1.5)
    if name in REWARDED:
        more["reward_funcs"] = reward
    with quiet():
        made = getattr(home, f"{name}Trainer")(
            model=model_of(folder),
            args=getattr(home, f"{name}Config")(**options),
            train_dataset=data,
            processing_class=transformers().AutoTokenizer.from_pretrained(folder),
            **more,
        )
    if name in (*REWARDED, *TEACHERS):
        answering(made.model, options.get("max_completion_length") or options["max_new_tokens"])
    return made


def lora(**config):
    import peft

    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | config)


def model_of(folder):
    made = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made.config._experts_implementation = "eager"  # the grouped GEMMs of experts have no fp64
    return made


@contextlib.contextmanager
def quiet():
    """Without what these packages print and warn of."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def curves(made):
    """What a run logs, [steps] in fp64 by name; each is logged at every step or at none."""
    gc.freeze()  # Accelerate collects garbage as a run begins, of which these libraries have a second
    with quiet():
        made.train()
    gc.unfreeze()
    logged = collections.defaultdict(list)
    for entry in made.state.log_history[:-1]:
        for name, value in entry.items():
            if not any(part in name for part in TIMES):
                logged[name].append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in logged.items()}


def made_exact(made):
    """The trainer in fp64, with full logits."""
    for which in (made.model, getattr(made, "ref_model", None), getattr(made, "teacher_model", None)):
        if which is not None:
            in_fp64(which)
    for which in (made.model, getattr(made, "ref_model", None)):
        if which is not None and not hasattr(made, "teacher_model"):
            plain_head(which, getattr(made, "temperature", 1.0))
    return made


def plain_head(which, temperature):
    """Answers `fused_lm_head=True` from the logits of the model's own forward."""
    from trl.trainer.utils import FusedCausalLMOutput

    which = which.get_base_model() if hasattr(which, "get_base_model") else which
    own = type(which).forward

    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return own(which, *args, labels=labels, **kwargs)
        outputs = own(which, *args, **kwargs)
        logprobs = (outputs.logits[:, :-1] / temperature).log_softmax(-1)
        labels = labels[:, 1:]
        mask = labels != -100
        picked = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        fields = {
            "log_probs": picked,
            "entropy": -(logprobs.exp() * logprobs).sum(-1),
            "log_sum_sq_probs": (2 * logprobs).logsumexp(-1).detach(),
            "mean_logits": (outputs.logits[:, :-1] / temperature).mean(-1).detach(),
            "is_top1": logprobs.argmax(-1) == labels,
        }
        fields = {name: value.masked_fill(~mask, 0) for name, value in fields.items()}
        loss = -fields["log_probs"].sum() / mask.sum()
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=outputs.get("aux_loss"), **fields)

    which.forward = forward


def plain_divergence(
    student, teacher, student_weight, teacher_weight, mask, beta, num_items_in_batch, temperature, **heads
):
    """In the place of TRL's function of the same arguments."""

    def log_softmax(side, hidden, weight):
        logits = hidden @ weight.t() * heads[f"{side}_logit_scale"]
        softcap = heads[f"{side}_final_logit_softcapping"]
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return (logits / temperature).log_softmax(-1)

    p, q = log_softmax("teacher", teacher, teacher_weight), log_softmax("student", student, student_weight)
    if beta == 0:
        divergence = p.exp() * (p - q)
    elif beta == 1:
        divergence = q.exp() * (q - p)
    else:
        mixture = (beta * p.exp() + (1 - beta) * q.exp()).log()
        divergence = beta * p.exp() * (p - mixture) + (1 - beta) * q.exp() * (q - mixture)
    divergence, entropy = (value.sum(-1) * mask for value in (divergence, -q.exp() * q))
    count = mask.sum() if num_items_in_batch is None else num_items_in_batch
    return divergence.sum() / count, entropy.sum(), mask.sum()
