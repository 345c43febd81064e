"""Every family of `transformers`: its fused head gives its own loss and gradients, or is refused with a reason."""

import json
from pathlib import Path

import pytest
from transformers_models import transformers

pytestmark = [
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of models that are to be trained in another way
]

TABLE = Path(__file__).parent / "transformers_families.json"
SOME = {  # and what of them matters
    "LlamaForCausalLM": "nothing stands between head and loss",
    "Gemma2ForCausalLM": "a softcap",
    "CohereForCausalLM": "a scale",
    "GraniteForCausalLM": "a divisor",
    "PhiForCausalLM": "a bias",
    "BertLMHeadModel": "a head behind a transform",
    "MixtralForCausalLM": "an auxiliary loss",
    "MarianMTModel": "final_logits_bias, labels that are not shifted",
    "Qwen2AudioForConditionalGeneration": "a loss that is masked by attention_mask",
    "Qwen2VLForConditionalGeneration": "a model that sees",
    "DoryForCausalLM": "refused: a learned scale of each class",
    "ChameleonForConditionalGeneration": "refused: logits are written to",
}


@pytest.fixture(scope="module")
def table():
    transformers()
    from family_table import Table

    found = Table.read(TABLE)
    if found.transformers != transformers().__version__:
        pytest.skip(f"the table is of transformers {found.transformers}, installed is {transformers().__version__}")
    return found


@pytest.fixture(scope="module")
def known():
    transformers()
    from family_classes import cases

    return cases()


def assert_as_in_the_table(name, kind, given, table):
    from family_comparison import row

    found, expected = row(name, kind, given), table.rows[name]
    if found.reason.startswith(("ImportError", "ModuleNotFoundError")):
        pytest.skip(found.reason)
    assert (found.outcome, found.items) == (expected.outcome, expected.items), found.reason
    if found.outcome == "refused":
        assert found.reason == expected.reason
    if found.outcome != "not built":
        assert found.own_loss == pytest.approx(expected.own_loss, rel=1e-2)  # it is the same model


@pytest.mark.parametrize("name", SOME)
def test_loss_and_gradients_of_some_families(name, table):
    assert_as_in_the_table(name, getattr(transformers(), name), {}, table)


def test_no_family_gets_another_number(table):
    assert {row.outcome for row in table.rows.values()} == {"equal", "refused", "not built"}
    assert all(row.reason for row in table.rows.values() if row.outcome != "equal")


@pytest.mark.slow  # imports every model of transformers
def test_the_table_has_every_case(table, known):
    assert set(known) <= set(table.rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", json.loads(TABLE.read_text())["rows"])
def test_loss_and_gradients_of_all_families(name, table, known):
    if name not in known:
        pytest.skip(f"{name} needs a package to be imported")
    assert_as_in_the_table(name, *known[name], table)
