"""FLOPs of shapes that were not counted."""

from safe_lab.resources.flops import fit_flops


def transformer(examples, length, *, constant=0):
    return examples * (1000 * length + 7 * length**2 + 13) + constant


def known(*shapes, **options):
    return {shape: {"forward": transformer(*shape, **options), "backward": 2 * transformer(*shape)} for shape in shapes}


def test_three_lengths_give_every_shape_of_a_transformer_exactly():
    flops = fit_flops(known((32, 16), (32, 64), (7, 40)))
    assert flops((5, 100)) == {"forward": transformer(5, 100), "backward": 2 * transformer(5, 100)}


def test_counted_shapes_are_as_counted_even_where_no_rule_holds():
    odd = {(1, 1): {"forward": 5}, (1, 2): {"forward": 3}, (1, 3): {"forward": 100}, (2, 3): {"forward": 17}}
    assert fit_flops(odd)((2, 3)) == {"forward": 17}


def test_fewer_than_three_lengths_are_scaled_by_the_tokens():
    assert fit_flops({(4, 10): {"forward": 1000}})((2, 10)) == {"forward": 500}
    assert fit_flops({(4, 10): {"forward": 1000}, (4, 20): {"forward": 2400}})((4, 18)) == {"forward": 2160}


def test_what_is_done_once_for_all_examples_is_found():
    # DeBERTa's relative positions, seen at two numbers of examples.
    counted = known((32, 16), (32, 64), (32, 40), (8, 40), constant=10**6)
    assert fit_flops(counted)((17, 50))["forward"] == transformer(17, 50, constant=10**6)


def test_a_phase_that_breaks_the_rule_is_scaled_and_the_others_are_not():
    counted = known((32, 16), (32, 64), (32, 40), (8, 40), (8, 64))
    counted[8, 64]["forward"] += 1
    flops = fit_flops(counted)((32, 50))
    assert flops["backward"] == 2 * transformer(32, 50)
    assert flops["forward"] == round(counted[32, 40]["forward"] * 50 / 40)
