"""Make an assignment from derain.py: the same file, with the bodies of some functions left to the student.

    python tests/make_assignment.py                           # which assignments there are
    python tests/make_assignment.py rain -o student.py        # one of them, or several
    python -m pytest --module student.py --assignment rain    # grades it (tests/grader.py)

What each asks, and the figure that a right answer draws, is in tests/coursework.md.
"""

import argparse
import ast
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "derain.py"
MARK = "coursework: "  # begins the message of each blank; grader.py knows blanks by it

# For each assignment its functions, and for each function the tests that grade it: file::name, and [parameters]
# where only one case does.  (Tests that measure time are not here: a busy machine would cost marks.)
ASSIGNMENTS = {
    "rain": {
        "teaches": "how rain is synthesized: seeds, a line kernel, a convolution, clipping; directions and units",
        "time": "an hour",
        "functions": {
            "streak_kernel": (
                "test_rain.py::test_kernel_is_a_blurred_line", "test_rain.py::test_kernel_has_one_at_its_centre",
                "test_rain.py::test_kernel_leans_like_a_slash",
                "test_rain.py::test_kernel_batch_equals_singles",
                "test_rain.py::test_width_and_length_at_half_brightness"),
            "draw_factors": (
                "test_rain.py::test_factors_stay_in_their_intervals", "test_rain.py::test_either_side_mirrors_half"),
            "streak_seeds": ("test_rain.py::test_quantity_is_the_number_of_seeds",),
            "render_rain": (
                "test_rain.py::test_filtering_equals_a_plain_loop", "test_rain.py::test_layers_shape_range_and_sizes",
                "test_rain.py::test_same_seed_same_bytes", "test_rain.py::test_direction_can_be_measured",
                "test_rain.py::test_quantity_can_be_measured_in_the_layer"),
            "add_rain": ("test_rain.py::test_add_rain_clips_and_is_grey",),
        }},
    "evaluation": {
        "teaches": "measuring removal and damage apart; masks, root mean squares, PSNR, SSIM and their edge cases",
        "time": "an hour",
        "functions": {
            "rain_mask": ("test_evaluation.py::test_mask_is_strict_and_joins_channels",),
            "decoupled_evaluation": (
                "test_evaluation.py::test_against_a_loop", "test_evaluation.py::test_limits",
                "test_evaluation.py::test_constant_errors_in_closed_form",
                "test_evaluation.py::test_no_rain_and_rain_everywhere",
                "test_evaluation.py::test_coloured_rain_and_tiny_images",
                "test_evaluation.py::test_wrong_shapes_are_refused"),
            "psnr": ("test_evaluation.py::test_psnr_closed_form_is_a_mean_over_images",),
            "ssim": ("test_evaluation.py::test_ssim_against_a_loop",),
        }},
    "backgrounds": {
        "teaches": "what makes an image complex: sharpness, fair sampling, the statistics of natural images",
        "time": "an afternoon",
        "functions": {
            "sharpness": ("test_backgrounds.py::test_sharpness_of_a_ramp_and_against_a_loop",),
            "sample_patches": (
                "test_backgrounds.py::test_patches_come_from_the_images_evenly",
                "test_backgrounds.py::test_patches_reach_every_corner"),
            "draw_leaves": (
                "test_backgrounds.py::test_painters[natural]",
                "test_backgrounds.py::test_dead_leaves_have_a_natural_spectrum",
                "test_backgrounds.py::test_categories_have_the_properties_they_stand_for",
                "test_backgrounds.py::test_windows_repeat"),
        }},
    "noise": {
        "teaches": "five kinds of noise and what tells them apart; an evaluation that needs no mask",
        "time": "an afternoon",
        "functions": {
            "noise_degradation": (
                "test_noise.py::test_noise_is_clipped_and_added_and_comes_from_its_stream",
                "test_noise.py::test_variance_is_that_of_the_closed_form",
                "test_noise.py::test_levels_are_drawn_per_image_within_their_interval",
                "test_noise.py::test_uniform_noise_is_bounded_and_gaussian_is_not",
                "test_noise.py::test_poisson_noise_grows_with_brightness",
                "test_noise.py::test_salt_and_pepper_hits_whole_pixels_and_leaves_the_others",
                "test_noise.py::test_correlation_of_neighbours"),
            "dense_evaluation": (
                "test_noise.py::TestDenseEvaluation::test_ends",
                "test_noise.py::TestDenseEvaluation::test_removal_and_damage_are_told_apart",
                "test_noise.py::TestDenseEvaluation::test_the_squares_add_up_to_the_whole_error",
                "test_noise.py::TestDenseEvaluation::test_wrecking_the_image_shows_in_e_b_alone"),
        }},
    "training": {
        "teaches": "two convolutional networks, and one training loop that an interruption does not change",
        "time": "a day",
        "functions": {
            "ResNet.forward": (
                "test_training.py::test_resnet_sees_ten_pixels_around", "test_training.py::test_resnet_adds_its_blocks",
                "test_networks.py::test_resnet_with_a_skip_draws_a_correction",
                "test_networks.py::test_networks_take_images_of_any_size[resnet]"),
            "pad_to_multiple": ("test_networks.py::test_padding_does_not_move_the_image[unet]",),
            "UNet.forward": (
                "test_networks.py::test_networks_take_images_of_any_size[unet]",
                "test_networks.py::test_unet_gets_its_details_back"),
            "train": (
                "test_training.py::test_training_is_adam_on_the_l1_loss_with_a_rate_that_falls_along_half_a_cosine",
                "test_training.py::test_training_sees_only_its_backgrounds_and_their_mirror_images",
                "test_training.py::test_interrupted_training_ends_with_the_same_weights",
                "test_training.py::test_few_and_many_differ_in_the_backgrounds_alone",
                "test_training.py::test_training_lowers_the_loss_and_repeats_to_the_bit"),
        }},
    "attention": {
        "teaches": "window attention: shapes, heads, relative positions, shifted windows and their mask",
        "time": "a week",
        "functions": {
            "to_windows": ("test_networks.py::test_windows_are_cut_and_put_back",),
            "from_windows": ("test_networks.py::test_windows_are_cut_and_put_back",),
            "shift_mask": ("test_networks.py::test_window_attention_is_that_of_a_loop_over_pixels[shifted]",),
            "WindowAttention.forward": (
                "test_networks.py::test_window_attention_is_that_of_a_loop_over_pixels[plain]",),
            "SwinBlock.forward": (
                "test_networks.py::test_window_attention_is_that_of_a_loop_over_pixels",
                "test_networks.py::test_swinir_agrees_with_the_published_one",
                "test_networks.py::test_networks_take_images_of_any_size[swinir]",
                "test_networks.py::test_padding_does_not_move_the_image[swinir]"),
        }},
    "quantization": {
        "teaches": "vector quantization, the straight-through gradient, a codebook as a prior of clean images",
        "time": "a week",
        "functions": {
            "ResidualBlock.forward": (
                "test_vqgan.py::test_a_residual_block_by_hand", "test_vqgan.py::test_vqgan_agrees_with_the_published_one"),
            "PixelAttention.forward": (
                "test_vqgan.py::test_attention_of_pixels_is_that_of_a_loop",
                "test_vqgan.py::test_vqgan_agrees_with_the_published_one"),
            "Codebook.forward": (
                "test_vqgan.py::test_quantization_is_the_nearest_neighbour",
                "test_vqgan.py::test_gradients_of_quantization"),
            "VQGANPrior.forward": ("test_vqgan.py::test_what_the_prior_shows_is_made_of_codes",),
            "VQGANPrior.loss": (
                "test_vqgan.py::test_the_loss_of_the_prior", "test_vqgan.py::test_fine_tuning_moves_the_encoder_alone",
                "test_vqgan.py::test_fine_tuning_with_a_vqgan_of_any_depth"),
        }},
    "experiment": {
        "teaches": "from a claim to a verdict: paired seeds, fair comparisons, an experiment that could refute",
        "time": "a week",
        "functions": {
            "training_patches": (
                "test_reproduce.py::test_few_backgrounds_are_among_the_many",
                "test_reproduce.py::test_thirds_by_sharpness_have_equal_numbers_and_do_not_overlap"),
            "results": ("test_reproduce.py::test_which_rows_a_claim_reads",),
            "verdict": ("test_reproduce.py::test_verdict_needs_every_seed",),
            "verdict_rows": (
                "test_reproduce.py::test_verdict_table_of_hand_made_results",
                "test_reproduce.py::test_a_second_metric_has_verdicts_of_its_own"),
        }},
}


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function of a dotted name, such as "train" or "ResNet.forward"; raises KeyError if there is none."""
    node = tree
    for part in name.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == part]
        if not named:
            raise KeyError(name)
        node = named[-1]
    if not isinstance(node, ast.FunctionDef):
        raise KeyError(name)
    return node


def blank(source: str, names: list[str]) -> str:
    """The source with the body of each named function replaced by a raise; all else stays byte for byte."""
    tree, lines = ast.parse(source), source.split("\n")
    for node, name in sorted(((find(tree, name), name) for name in names), key=lambda pair: -pair[0].lineno):
        first = node.body[0]
        if ast.get_docstring(node) is not None:
            start = first.end_lineno  # keep the lines before this one (counted from 0)
        else:
            start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
        message = f"{MARK}{name} is not written yet"
        lines[start:node.end_lineno] = [f'{" " * first.col_offset}raise NotImplementedError("{message}")']
        node.body = [*node.body[:ast.get_docstring(node) is not None], *ast.parse(lines[start].strip()).body]
    result = "\n".join(lines)
    assert ast.dump(ast.parse(result)) == ast.dump(tree)  # nothing else has changed
    return result


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a copy of derain.py with some functions left to do.")
    parser.add_argument("assignments", nargs="*", metavar="SECTION", help="; ".join(ASSIGNMENTS))
    parser.add_argument("-o", "--output", type=Path, help="the student's file, such as student.py")

    def fail(problem: str):
        print(f"make_assignment.py: {problem}", file=sys.stderr)
        sys.exit(2)

    parser.error = fail
    args = parser.parse_args()
    if not args.assignments:
        for name, assignment in ASSIGNMENTS.items():
            print(f"{name} ({assignment['time']}): {assignment['teaches']}\n    {', '.join(assignment['functions'])}")
        return 0
    unknown = [name for name in args.assignments if name not in ASSIGNMENTS]
    if unknown:
        fail(f"there is no assignment {', '.join(unknown)}; there are {', '.join(ASSIGNMENTS)}")
    if not args.output:
        fail("say where the student's file goes, such as -o student.py")
    names = list(dict.fromkeys(name for chosen in args.assignments for name in ASSIGNMENTS[chosen]["functions"]))
    text = blank(SOURCE.read_bytes().decode("utf-8"), names)
    try:
        with open(args.output, "x", encoding="utf-8", newline="") as file:  # never over somebody's work
            file.write(text)
    except FileExistsError:
        fail(f"{args.output} is there already; move it away, or choose another name")
    except OSError as problem:
        fail(f"{args.output} cannot be written: {problem.strerror}")
    # pytest takes the student.py of `--module student.py` for a place with tests, and looks beside it for what
    # defines its options.
    beside = args.output.parent / "conftest.py"
    if not beside.exists():
        beside.write_text(f"import sys\n\nsys.path.insert(0, {str(SOURCE.parent / 'tests')!r})\n"
                          'pytest_plugins = ["grader"]\n')
    print(f"{args.output}: {len(names)} functions to write ({', '.join(names)})")
    print(f"{beside}: tells pytest where the grader is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
