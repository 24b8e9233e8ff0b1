import pytest

from benchmarks.step_profile import kind_of, record, sizes_of


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[512, 576], [576, 49152]], "head, products"),
        ("aten::_log_softmax", [[512, 49152], [], []], "head and embedding, the rest"),
        ("aten::addmm", [[512, 576], [576, 16384]], "SAE, products"),
        ("aten::mul", [[512, 16384], [512, 16384]], "SAE, the rest"),
        ("aten::mm", [[512, 576], [576, 1536]], "body, products"),
        ("aten::silu", [[512, 1536]], "body, the rest"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[1, 9, 512, 64]], "attention"),
        ("aten::_fused_adam_", [[[49152, 576]], []], "optimiser, with the gradient's norm"),
    ],
)
def test_the_kind_of_an_operation_is_told_by_name_and_sizes(name, shapes, kind):
    assert kind_of(name, sizes_of(shapes), vocabulary=49152, width=16384) == kind


def test_a_profile_shares_all_time_out_among_the_kinds(prepared):
    setting, folder = prepared
    result = record(setting, folder, "fpo")
    assert sum(row["%"] for row in result["kinds"]) == pytest.approx(100)
    kinds = {row["kind"] for row in result["kinds"]}
    assert {"body, products", "head, products", "attention", "optimiser, with the gradient's norm"} <= kinds
