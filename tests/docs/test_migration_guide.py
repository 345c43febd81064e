"""The migration guide names what exists, has every argument of others, and its snippets run."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import compiled_loss

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


CODE = re.compile(r"`([^`]+)`")


def tables():
    """{what is migrated from: (ours, rows of cells)}, by the headings `theirs`, `theirs` → `ours`."""
    found = {}
    for section in re.split(r"^### ", GUIDE, flags=re.MULTILINE)[1:]:
        heading, body = section.split("\n", 1)
        theirs, ours = (CODE.findall(side) for side in heading.split("→"))
        body = re.split(r"^## ", body, flags=re.MULTILINE)[0]
        rows = [
            [c.strip() for c in line.strip("| ").split(" | ")] for line in re.findall(r"^\|.*\|$", body, re.MULTILINE)
        ]
        found[tuple(theirs)] = (ours, [row + [""] * (3 - len(row)) for row in rows[2:]])
    return found


TABLES = tables()


def keywords(name):
    """The names that calls of a public name take; of a class also those of what its instances do."""
    value = getattr(compiled_loss, name)
    callables = [
        value,
        *(getattr(value, m) for m in ("forward", "build") if inspect.isclass(value) and hasattr(value, m)),
    ]
    return {parameter for c in callables for parameter in inspect.signature(c).parameters}


def unknown(code, owner):
    """What a piece of code names that does not exist: an argument of `owner`, or calls, keywords and public names."""
    if re.fullmatch(r"\w+", code):
        return [] if code in keywords(owner) or hasattr(compiled_loss, code) else [code]
    tree = ast.parse(f"{owner}({code})" if re.match(r"\w+=", code) else code)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        keyword.arg
        for call in calls
        for keyword in call.keywords
        if not hasattr(compiled_loss, call.func.id) or keyword.arg not in keywords(call.func.id)
    ]


@pytest.mark.parametrize("theirs", TABLES, ids="-".join)
def test_names_in_the_tables_exist(theirs):
    (owner,), rows = TABLES[theirs]
    assert rows
    for their, our, why in rows:
        assert CODE.findall(their), their
        if our.startswith("not "):
            assert re.match(r"not (needed|offered)$", our), our
            assert len(why.split()) >= 4, f"{their}: {our}, because?"
        else:
            assert CODE.findall(our), our
            assert [name for code in CODE.findall(our) for name in unknown(code, owner)] == [], our
    assert not re.search(r"\bn/?a\b", GUIDE, re.IGNORECASE)


def test_table_reader():
    assert unknown("labels", "cross_entropy") == unknown("KDLoss", "cross_entropy") == []
    assert unknown("lables", "cross_entropy") == ["lables"]
    assert unknown("chunking=Chunking(chunk=...)", "linear_cross_entropy") == ["chunk"]
    assert unknown("cross_entropy(chunking=...)", "linear_cross_entropy") == ["chunking"]
    assert unknown("shifts=1", "linear_cross_entropy") == ["shifts"]


def arguments(theirs):
    """The arguments that a table has rows for."""
    return {name.removesuffix(" (0.7)") for their, _, _ in TABLES[theirs][1] for name in CODE.findall(their)}


def test_every_argument_of_torch_has_a_row():
    assert arguments(("torch.nn.functional.cross_entropy",)) == set(inspect.signature(F.cross_entropy).parameters)
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    options = {f"options.{field.name}" for field in dataclasses.fields(torch.nn.LinearCrossEntropyOptions)}
    own = set(inspect.signature(F.linear_cross_entropy).parameters)
    assert arguments(("torch.nn.functional.linear_cross_entropy",)) == own | options


# Their arguments, as the guide says in which versions; those of Modules' constructors and calls together.
CE = "ignore_index reduction"
THEIRS = {
    "MaskedCrossEntropy": f"fp32_upcast {CE} logits labels mask num_label_tokens loss_weights",
    "FusedLinearCrossEntropy": f"{CE} logit_softcapping impl hidden_states labels lm_weight num_label_tokens "
    "grad_reduce_group loss_weights",
    "ChunkedCrossEntropy": f"{CE} chunk_len compile hidden_states labels lm_weight num_label_tokens grad_reduce_group "
    "loss_weights mask logits_dtype",
    "TEParallelCrossEntropy": f"{CE} tp_group logits labels mask num_label_tokens",
    "KDLoss": "ignore_index temperature fp32_upcast tp_group chunk_size student_logits teacher_logits labels "
    "num_batch_labels",
    "masked_soft_cross_entropy": "logits target_probs position_mask",
    "calculate_loss": "loss_fn logits labels hidden_states model lm_weight num_label_tokens grad_reduce_group "
    "loss_weights logits_dtype",
    "calculate_mtp_loss": "loss_fn mtp_per_depth_h mtp_per_depth_logits mtp_per_depth_targets labels model "
    "scaling_factor num_label_tokens ignore_index cu_seqlens seq_idx lm_weight grad_reduce_group return_per_depth "
    "loss_weights logits_dtype",
    "PipelineCausalLMLoss": "loss_fn model scaling_factor ignore_index grad_reduce_group output labels",
    "MTPLossConfig": "scaling_factor ignore_index loss_fn model grad_reduce_group",
    "LossFromFactoryConfig": "factory kwargs",
    "build_loss_config": "loss loss_kwargs",
    "LigerCrossEntropyLoss": f"input target weight size_average reduce {CE} label_smoothing lse_square_scale softcap "
    "return_z_loss return_token_accuracy return_predicted_tokens",
    "LigerFusedLinearCrossEntropyLoss": f"input weight target bias ce_weight {CE} lse_square_scale label_smoothing "
    "softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy return_predicted_tokens chunk_mem_const",
    "LigerFusedLinearJSDLoss": "weight_hard_loss weight_soft_loss beta ignore_index temperature compiled chunk_size "
    "return_soft_hard_loss student_input student_weight teacher_input teacher_weight true_labels student_bias "
    "teacher_bias",
    "LigerFusedLinearJSD": "student_input student_weight teacher_input teacher_weight shift_labels jsd_beta "
    "ignore_index temperature accum_dtype",
    "LigerFusedLinearDPOLoss": "lin_weight _input target bias ref_input ref_weight ref_bias nll_target ignore_index "
    "beta alpha compute_nll_loss use_ref_model average_log_prob loss_type label_smoothing discopop_tau gamma compiled "
    "chunk_size",
    "LigerFusedLinearKTOLoss": "_input lin_weight target preference_labels bias ref_input ref_weight ref_bias kl "
    "ignore_index beta use_ref_model average_log_prob compiled chunk_size",
    "LigerFusedLinearGRPOLoss": "_input lin_weight selected_token_ids attention_mask advantages bias "
    "ref_per_token_logps old_per_token_logps ref_input ref_weight ref_bias use_ref_model vllm_is_ratio "
    "num_items_in_batch max_completion_length beta epsilon_low epsilon_high delta loss_type importance_sampling_level "
    "sapo_temperature_pos sapo_temperature_neg temperature use_bias_correction_kl vespo_k_pos vespo_lambda_pos "
    "vespo_k_neg vespo_lambda_neg compiled chunk_size",
    "trl.trainer.utils.add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs labels shift_labels "
    "FusedCausalLMOutput.loss FusedCausalLMOutput.log_probs FusedCausalLMOutput.entropy FusedCausalLMOutput.is_top1 "
    "FusedCausalLMOutput.log_sum_sq_probs FusedCausalLMOutput.mean_logits FusedCausalLMOutput.label_mask",
    "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss": "student_logits teacher_logits labels beta temperature "
    "reduction num_items_in_batch",
    "cut_cross_entropy.linear_cross_entropy": f"e c targets bias {CE} softcap shift return_lse filter_eps accum_e_fp32 "
    "accum_c_fp32 filter_e_grad filter_c_grad impl vocab_parallel_options",
}


def test_every_argument_of_others_has_a_row():
    first = {theirs[0]: theirs for theirs in TABLES}
    assert {name: arguments(first[name]) for name in THEIRS} == {n: set(a.split()) for n, a in THEIRS.items()}
    assert first.keys() == THEIRS.keys() | {f"torch.nn.functional.{n}cross_entropy" for n in ("", "linear_")}


AUTOMODEL = {
    "masked_ce": "MaskedCrossEntropy",
    "linear_ce": "FusedLinearCrossEntropy",
    "te_parallel_ce": "TEParallelCrossEntropy",
    "kd_loss": "KDLoss",
    "soft_ce": "masked_soft_cross_entropy",
    "mtp": "calculate_mtp_loss PipelineCausalLMLoss MTPLossConfig",
    "utils": "calculate_loss",
    "loss": "LossConfig MaskedCrossEntropyConfig FusedLinearCEConfig TEParallelCEConfig KDLossConfig "
    "LossFromFactoryConfig LOSS_CONFIG_REGISTRY build_loss_config build_loss_module",
}


def test_every_name_of_automodel_is_here():
    """Under the same name; what came later under the name that the row says."""
    rows = {(module, name): ours for module, name, ours in re.findall(r"^\| `(\w+)\.(\w+)` \| `(\w+)`", GUIDE, re.M)}
    assert rows == {(module, name): name for module, names in AUTOMODEL.items() for name in names.split()}
    later = re.findall(r"^\| `\w+\.\w+` \(0\.7\) \| `(\w+)`", GUIDE, re.M)
    assert len(later) == 5
    assert {*rows.values(), *later} <= set(compiled_loss.__all__)


DIFFS = re.findall(r"^```diff\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
OTHERS = ("nemo_automodel", "liger_kernel", "trl", "cut_cross_entropy")


def run(lines):
    """The loss that lines of a snippet compute, on tensors of the names that snippets use."""
    torch.manual_seed(0)
    scope = {
        "F": F,
        "hidden": torch.randn(2, 5, 4),
        "lm_head": torch.nn.Linear(4, 11, bias=False),
        "logits": torch.randn(2, 5, 11),
        "labels": torch.randint(0, 11, (2, 5)).masked_fill_(torch.rand(2, 5) < 0.3, -100),
        "class_weights": torch.rand(11),
        "num_label_tokens": 7,
        "student_hidden": torch.randn(2, 5, 4),
        "student_weight": torch.randn(11, 4),
        "teacher_hidden": torch.randn(2, 5, 3),
        "teacher_weight": torch.randn(11, 3),
    }
    exec("\n".join(line[1:] for line in lines), scope)
    return scope["loss"]


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_snippets(diff):
    """Ours run. Theirs too, and say the same, where torch has them; those of other libraries are not installed."""
    before, after = ([line for line in diff.splitlines() if line[0] in kept] for kept in ("- ", "+ "))
    loss = run(after)
    assert loss.isfinite() and loss.dtype == torch.float32
    theirs = "\n".join(before)
    if any(name in theirs for name in OTHERS) or ("F.linear" in theirs and not hasattr(F, "linear_cross_entropy")):
        return
    torch.testing.assert_close(loss, run(before))


def test_each_library_has_a_snippet():
    libraries = re.findall(r"^## From (.*?)\n.*?```diff", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(libraries) == len(re.findall("^## From ", GUIDE, re.MULTILINE)) == 6
    assert sum(any(name in diff for name in OTHERS) for diff in DIFFS) == len(DIFFS) - 3


def test_liger_hard_and_soft_weights():
    """What the guide says of h, s and T, against the divergences as torch computes them."""
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
    for h, s, t in ((0.5, 0.5, 1.0), (0.3, 0.9, 2.0)):
        log_q, log_p = (torch.log_softmax(z / t, -1) for z in (student, teacher))
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        theirs = h * F.cross_entropy(student, labels) + s * soft
        total = h + s / t**2
        ours = compiled_loss.distillation(student, teacher, labels, temperature=t, hard_label_weight=h / total)
        torch.testing.assert_close(total * ours, theirs)


def test_torch_probabilities_are_soft_targets():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 7), torch.randn(5, 7).softmax(-1)
    ours = compiled_loss.masked_soft_cross_entropy(logits, target, torch.ones(5))
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))
