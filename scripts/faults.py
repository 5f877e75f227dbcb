"""Put each fault of docs/faults.md back into a copy of the source, and see that the test that holds it fails.

    python scripts/faults.py             # all of them, about five minutes on one core
    python scripts/faults.py a3 b14      # those of these findings

Each fault is one replacement in one file. Exit status 1 if a test passes with its fault, or without one fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FAULTS", "Fault", "main", "with_fault"]

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240.0  # of a test with its fault; one that hangs does not pass


@dataclass(frozen=True, slots=True)
class Fault:
    """A finding's number, a file of src/starflow2, what stands there, what stood there, and the test that holds it."""

    number: str
    file: str
    text: str
    fault: str
    test: str


FAULTS = (
    Fault(
        "a1",
        "core/images.py",
        "Image.open(io.BytesIO(data), formats=FORMATS)",
        "Image.open(io.BytesIO(data))",
        "tests/core/test_images.py::test_other_formats_are_refused_and_none_of_them_starts_a_program",
    ),
    Fault(
        "a2",
        "core/images.py",
        "if max(-low, high) > 1 + ROUNDING:",
        "if False:",
        "tests/test_gates.py::test_no_door_takes_pixels_of_another_type_or_range",
    ),
    Fault(
        "a3",
        "core/torch_defaults.py",
        "if torch.is_autocast_enabled(device):",
        "if False:",
        "tests/test_gates.py::test_the_callers_settings_change_no_number_and_no_call_changes_a_weight",
    ),
    Fault(
        "a3",
        "core/torch_defaults.py",
        "stack.enter_context(_PROCESS)",
        "pass",
        "tests/test_gates.py::test_a_model_that_is_loaded_under_other_settings_is_the_same_model",
    ),
    Fault(
        "a3",
        "core/torch_defaults.py",
        "stack.enter_context(torch.inference_mode(False))",
        "pass",
        "tests/test_gates.py::test_a_session_goes_on_outside_of_the_settings_it_was_begun_under",
    ),
    Fault(
        "a4",
        "models/fae.py",
        "return F.batch_norm(_rows(mean), stored.running_mean, stored.running_var, eps=stored.eps).view(mean.shape)",
        "return stored(_rows(mean)).view(mean.shape)",
        "tests/test_gates.py::test_the_callers_settings_change_no_number_and_no_call_changes_a_weight",
    ),
    Fault(
        "a5",
        "core/text.py",
        'data.decode("utf-8-sig")',
        'data.decode("utf-8")',
        "tests/core/test_text.py::test_a_file_reads_with_and_without_a_byte_order_mark",
    ),
    Fault(
        "a6",
        "models/checkpoint.py",
        'write_text("\\n".join(sorted(components.vocabulary)) + "\\n", encoding="utf-8")',
        'write_text("\\n".join(sorted(components.vocabulary)) + "\\n", encoding="ascii")',
        "tests/models/test_model_folder.py::test_words_of_any_alphabet_are_saved_as_utf_8",
    ),
    Fault(
        "a7",
        "core/files.py",
        "os.chmod(path, mode)",
        "pass",
        "tests/models/test_model_folder.py::test_every_file_has_the_permissions_that_the_umask_leaves",
    ),
    Fault(
        "a8",
        "core/images.py",
        'if image.format != "MPO" and getattr(image, "is_animated", False):',
        'if getattr(image, "is_animated", False) or image.format == "MPO":',
        "tests/core/test_images.py::test_a_phone_photo_with_a_second_picture_in_its_file_is_its_first",
    ),
    Fault(
        "a9",
        "core/folders.py",
        "flush_folder(folder)\n            _put_in_place(folder)\n",
        "twin = folder.with_name(f'.{folder.name}.new')\n            (folder / WAITING).rename(twin)\n"
        "            shutil.rmtree(folder)\n            twin.rename(folder)\n",
        "tests/models/test_model_folder.py::test_a_model_can_be_saved_where_one_stands",
    ),
    Fault(
        "a10",
        "data/shards.py",
        "glob.escape(folder) if is_literal else folder",
        "folder",
        "tests/data/test_corpora.py::test_a_folder_whose_name_has_brackets_is_found",
    ),
    Fault(
        "a10",
        "data/shards.py",
        "if not url.strip():",
        "if False:",
        "tests/data/test_corpora.py::test_an_empty_name_does_not_read_the_whole_disk_and_a_quoted_tilde_not_the_home",
    ),
    Fault(
        "a11",
        "core/images.py",
        'return sorted(path for path in files if not path.name.startswith(".") and path.is_file())',
        "return sorted(files)",
        "tests/training/test_finetune.py::test_hidden_files_are_no_images_and_all_that_is_refused_is_named_at_once",
    ),
    Fault(
        "a12",
        "core/colours.py",
        "    if embedded:\n",
        "    if False:\n",
        "tests/core/test_images.py::test_colours_of_a_profile_become_those_of_srgb",
    ),
    Fault(
        "a12",
        "core/colours.py",
        "if space is None or space.is_srgb:",
        "if True:",
        "tests/core/test_colours.py::test_a_png_of_another_gamma_is_read_as_the_light_that_it_means",
    ),
    Fault(
        "a13",
        "cli/app.py",
        "        _discard_output()\n        return 141",
        "        raise",
        "tests/cli/test_cli.py::test_a_reader_that_leaves_or_a_full_disk_costs_no_traceback",
    ),
    Fault(
        "a15",
        "core/fields.py",
        "found = operator.index(value)",
        "found = value",
        "tests/test_gates.py::test_no_door_takes_a_count_or_seed_that_is_no_whole_number_in_range",
    ),
    Fault(
        "a15",
        "core/fields.py",
        "    if not math.isfinite(found):\n",
        "    if False:\n",
        "tests/core/test_fields.py::test_single_numbers_pass_the_same_gate",
    ),
    Fault(
        "a16",
        "models/wording.py",
        "if other is not None and all(part in vocabulary for part in other.split()):",
        "if False:",
        "tests/models/test_wording.py::test_everyday_wording_is_read_in_words_that_nano_knows",
    ),
    Fault(
        "a16",
        "models/wording.py",
        "        if is_member:\n",
        "        if False:\n",
        "tests/models/test_wording.py::test_an_unknown_word_is_answered_with_words_of_its_class",
    ),
    Fault(
        "a17",
        "data/shards.py",
        "not tail.first.startswith(COMPRESSED) and ",
        "",
        "tests/data/test_corpora.py::test_a_compressed_tar_under_the_name_of_a_plain_one_has_an_end",
    ),
    Fault(
        "a17",
        "core/text.py",
        'lines = re.split(r"\\r\\n|\\r|\\n", read_text(path))',
        "lines = read_text(path).splitlines()",
        "tests/cli/test_cli.py::test_prompts_of_a_file_are_its_lines_and_have_no_byte_order_mark",
    ),
    Fault(
        "a17",
        "cli/parsing.py",
        "max(MIN_WIDTH, min(shutil.get_terminal_size().columns, WIDTH))",
        "shutil.get_terminal_size().columns",
        "tests/cli/test_cli.py::test_help_stays_readable_in_narrow_columns_and_without_docstrings",
    ),
    Fault(
        "b1",
        "core/folders.py",
        "return waiting if waiting.is_dir() else folder",
        "return folder",
        "tests/models/test_model_folder.py::test_a_save_killed_at_any_operation_leaves_one_whole_model_under_its_name",
    ),
    Fault(
        "b2",
        "training/state.py",
        "        check_tensors(path, tensors, expected, TrainingError)\n",
        "",
        "tests/training/test_tampered_state.py::test_a_state_with_a_tensor_that_is_not_the_runs_is_refused",
    ),
    Fault(
        "b2",
        "training/checkpoint.py",
        "        _check_numbers(path, settings, self.stage)\n",
        "",
        "tests/training/test_tampered_state.py::test_a_state_with_a_setting_that_cannot_be_is_refused",
    ),
    Fault(
        "b3",
        "models/checkpoint.py",
        'not is_model_config(whole(folder) / "config.json")',
        'not (whole(folder) / "config.json").exists()',
        "tests/models/test_model_folder.py::test_a_folder_of_another_library_is_never_replaced",
    ),
    Fault(
        "b4",
        "core/locks.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))",
        "pass",
        "tests/training/test_resume.py::test_a_second_run_in_a_folder_is_refused_by_who_trains_there",
    ),
    Fault(
        "b4",
        "core/locks.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))",
        "pass",
        "tests/models/test_model_folder.py::test_a_second_saver_is_told_who_saves",
    ),
    Fault(
        "b4",
        "core/files.py",
        'return f"{TEMPORARY}{secrets.token_hex(8)}.tmp"',
        'return f"{TEMPORARY}{os.getpid()}.tmp"',
        "tests/core/test_files.py::test_threads_that_write_one_file_at_once_all_succeed_and_leave_a_whole_one",
    ),
    Fault(
        "b5",
        "inference/session_file.py",
        "    check_tensors(path, tensors, _expected(saved, sampler, one_position))\n",
        "",
        "tests/inference/test_session_file.py::test_a_tensor_that_is_not_the_models_is_refused_by_its_name",
    ),
    Fault(
        "b5",
        "inference/session_file.py",
        "        _check_counts(saved, sampler)\n",
        "",
        "tests/inference/test_session_file.py::test_tensors_that_do_not_belong_together_are_refused",
    ),
    Fault(
        "b6",
        "core/fields.py",
        "Depth = Annotated[int, Range(least=0, most=4096)]",
        "Depth = Annotated[int, Range(least=0)]",
        "tests/models/test_model_folder.py::test_layers_are_counted_before_one_is_built",
    ),
    Fault(
        "b6",
        "core/json_reader.py",
        "    except (ValueError, RecursionError) as error:",
        "    except ValueError as error:",
        "tests/models/test_model_folder.py::test_a_config_that_is_no_json_is_refused",
    ),
    Fault(
        "b8",
        "models/checkpoint.py",
        "        if not bool(torch.isfinite(low) & torch.isfinite(high)):\n",
        "        if False:\n",
        "tests/models/test_model_folder.py::test_weights_that_are_not_finite_are_neither_saved_nor_loaded",
    ),
    Fault(
        "b8",
        "models/checkpoint.py",
        '    _check_values(here, f"cannot load {name} from {folder}")\n',
        "",
        "tests/models/test_pretrained.py::test_a_folder_that_is_broken_or_of_another_model_is_refused_by_name",
    ),
    Fault(
        "b8",
        "models/checkpoint.py",
        "        if digests.get(name) != file_digest(folder / name):\n",
        "        if False:\n",
        "tests/models/test_model_folder.py::test_a_flipped_bit_in_weights_is_noticed",
    ),
    Fault(
        "b9",
        "errors.py",
        'return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)',
        "return line",
        "tests/cli/test_cli.py::test_no_refusal_writes_escape_codes_to_the_terminal",
    ),
    Fault(
        "b10",
        "inference/doors.py",
        "if not self._lock.acquire(blocking=False):",
        "if not self._lock.acquire():",
        "tests/test_gates.py::test_a_session_that_is_in_use_says_so_and_is_unharmed",
    ),
    Fault(
        "b11",
        "core/images.py",
        "    if not math.isfinite(low + high):\n",
        "    if False:\n",
        "tests/test_gates.py::test_no_door_takes_pixels_of_another_type_or_range",
    ),
    Fault(
        "b12",
        "core/text.py",
        "    if not isinstance(text, str):\n        raise PromptError",
        "    if False:\n        raise PromptError",
        "tests/test_gates.py::test_no_door_takes_hidden_signs_or_what_is_no_text",
    ),
    Fault(
        "b12",
        "core/fields.py",
        "object.__setattr__(self, name, conform(kind, getattr(self, name), name))",
        "pass",
        "tests/training/test_config.py::test_no_field_takes_a_value_of_another_type_or_out_of_range",
    ),
    Fault(
        "b13",
        "research/paper_claims.py",
        "    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:",
        "    except ZeroDivisionError as error:",
        "tests/research/test_paper_claims.py::test_results_of_another_kind_are_refused_by_their_file",
    ),
    Fault(
        "b13",
        "evals/suite.py",
        "    if not isinstance(frozen, Mapping):\n",
        "    if False:\n",
        "tests/evals/test_geneval.py::test_every_change_of_the_lock_is_noticed_and_what_is_no_lock_is_refused",
    ),
    Fault(
        "b13",
        "core/ledger.py",
        "    except OSError:\n        os.ftruncate(descriptor, end)\n        raise\n",
        "    finally:\n        pass\n",
        "tests/core/test_files.py::test_a_full_disk_leaves_a_ledger_as_it_was",
    ),
    Fault(
        "b14",
        "core/serialize.py",
        "    except OSError as error:\n        raise ConfigError(",
        "    except ZeroDivisionError as error:\n        raise ConfigError(",
        "tests/models/test_model_folder.py::test_a_folder_in_the_place_of_a_file_is_a_refusal_and_no_traceback",
    ),
    Fault(
        "b15",
        "core/files.py",
        'os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)',
        "os.O_RDWR | os.O_CREAT",
        "tests/core/test_files.py::"
        "test_a_temporary_file_has_a_new_name_every_time_and_never_follows_a_link_laid_in_its_place",
    ),
    Fault(
        "b15",
        "core/files.py",
        "if path.is_file() and time.time() - path.stat().st_mtime > DAY:",
        "if False:",
        "tests/core/test_files.py::test_temporary_files_of_killed_processes_go_after_a_day",
    ),
    Fault(
        "b15",
        "training/shard_index.py",
        "if (module, name) not in KNOWN:",
        "if False:",
        "tests/training/test_tampered_state.py::test_an_index_that_names_a_function_is_refused_before_it_is_called",
    ),
    Fault(
        "b15",
        "training/shard_index.py",
        "            if self.digests.get(name) != file_digest(path):\n",
        "            if False:\n",
        "tests/training/test_tampered_state.py::test_shards_that_are_not_what_was_written_are_refused",
    ),
    Fault(
        "b15",
        "data/shards.py",
        "member.read() if info.size <= MEMBER else None",
        "member.read()",
        "tests/data/test_corpora.py::test_a_member_that_is_too_large_is_one_broken_sample_and_is_never_read",
    ),
    Fault(
        "b16",
        "cli/parsing.py",
        "if kind is Path and not text.strip():",
        "if False:",
        "tests/cli/test_parsing.py::test_no_command_takes_an_empty_name_for_the_current_folder",
    ),
    Fault(
        "b16",
        "core/files.py",
        "if not isinstance(name, str | os.PathLike) or not str(name).strip():\n        raise OutputError",
        "if False:\n        raise OutputError",
        "tests/core/test_files.py::test_an_empty_name_is_no_place_to_write_to",
    ),
    Fault(
        "b17",
        "core/places.py",
        "if is_of_the_system(real):",
        "if False:",
        "tests/core/test_places.py::test_the_system_and_the_whole_disk_are_refused_before_anything_is_listed",
    ),
    Fault(
        "b17",
        "core/files.py",
        "if is_of_the_system(path):",
        "if False:",
        "tests/core/test_places.py::test_what_looks_like_a_file_of_the_system_is_read_by_no_door",
    ),
    Fault(
        "b18",
        "core/imports.py",
        "except SystemExit as error:",
        "except KeyboardInterrupt as error:",
        "tests/core/test_places.py::test_a_module_that_fails_or_exits_is_refused_by_file_and_line",
    ),
    Fault(
        "b19",
        "pipeline.py",
        'of_kind(components, Components, "components", "StarFlow2.from_pretrained(name) loads a model")',
        "components",
        "tests/test_gates.py::test_arguments_of_another_kind_are_refused_before_anything_is_computed",
    ),
    Fault(
        "b19",
        "nn.py",
        'raise ShapeError(f"{name} is {described(x)}; expected a tensor ({wanted}).")',
        "pass",
        "tests/flow/test_flow_configs.py::test_what_is_no_config_and_no_tensor_is_refused_by_name",
    ),
    Fault(
        "m1",
        "models/pretzel.py",
        "left = torch.where(index % self.flow.deep.cfg.grid[1] > 0, index - 1, none)",
        "left = torch.where(index > 0, index - 1, none)",
        "tests/models/test_pretzel.py::"
        "test_the_adapter_reads_a_latent_and_its_neighbours_left_and_above_within_the_image",
    ),
    Fault(
        "m2",
        "models/pretzel.py",
        "base = latent.base + self._visual(",
        "base = latent.base - self._visual(",
        "tests/models/test_pretzel.py::test_the_flow_reads_its_latents_plus_the_visual_skip_of_the_states_there",
    ),
    Fault(
        "m3",
        "training/losses.py",
        "weight * at_least_fp32(u).square().mean()",
        "weight * at_least_fp32(u).square().sum()",
        "tests/training/test_losses.py::test_the_penalty_on_intermediate_latents_is_their_mean_square_times_its_weight",
    ),
    Fault(
        "m4",
        "inference/engine.py",
        "(above / limits.temperature)",
        "(above * limits.temperature)",
        "tests/inference/test_engine.py::"
        "test_tokens_are_chosen_with_the_probabilities_of_their_logits_over_the_temperature",
    ),
    Fault(
        "m5",
        "inference/sampler.py",
        "(config or self.config).prior_scale * torch.randn(",
        "torch.randn(",
        "tests/inference/test_engine.py::test_images_start_from_the_prior_times_the_scale_of_their_row",
    ),
    Fault(
        "m6",
        "training/trainer.py",
        'f"{self.group.rank * number + i}/{self.state.step}"',
        'f"{self.group.rank + i}/{self.state.step}"',
        "tests/training/test_accumulation.py::test_microbatches_count_by_the_replies_and_images_they_hold",
    ),
    Fault(
        "m7",
        "models/pretzel.py",
        "self.vlm.logits(h + injected)",
        "self.vlm.logits(h - injected)",
        "tests/models/test_pretzel.py::test_the_language_head_reads_its_states_plus_the_text_skip_of_the_flow",
    ),
    Fault(
        "m8",
        "training/losses.py",
        "> begin[:, None])",
        "> begin[:, None] + 1)",
        "tests/training/test_losses.py::test_positions_after_an_image_are_those_behind_its_begin_slot_in_its_document",
    ),
    Fault(
        "m10",
        "training/trainer.py",
        'f"{self.task.seed}/{self.stage.name}/{name}"',
        'f"{self.stage.name}/{name}"',
        "tests/training/test_accumulation.py::test_noise_is_another_one_for_another_seed_process_or_step",
    ),
)


def with_fault(source: str, fault: Fault) -> str:
    """The source of a file with the fault in it. Raises ValueError unless its place is there once."""
    if source.count(fault.text) != 1:
        raise ValueError(f"{fault.number}: {fault.file} has {fault.text!r} {source.count(fault.text)} times, not once")
    return source.replace(fault.text, fault.fault)


def passes(test: str, source: Path) -> bool:
    """True if a test passes over the package in `source`."""
    paths = os.pathsep.join(map(str, (source, ROOT / "tests", ROOT / "scripts")))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, timeout=SECONDS, stdout=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """One line for each fault; 1 if one of them goes unnoticed."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("findings", nargs="*", help="numbers such as a3; default all")
    wanted = parser.parse_args(argv).findings
    chosen = [fault for fault in FAULTS if not wanted or fault.number in wanted]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "starflow2"
        shutil.copytree(ROOT / "src" / "starflow2", package)
        for fault in chosen:
            path = package / fault.file
            whole = path.read_text("utf-8")
            path.write_text(with_fault(whole, fault), encoding="utf-8")
            seen = not passes(fault.test, Path(name))
            path.write_text(whole, encoding="utf-8")
            is_right = seen and passes(fault.test, Path(name))
            unnoticed += not is_right
            verdict = "noticed" if is_right else "UNNOTICED" if not seen else "FAILS WITHOUT IT"
            print(f"{fault.number:<4} {verdict:<16} {fault.file}: {fault.test.partition('::')[2]}", flush=True)
    print(f"faults: {len(chosen)}, {unnoticed} unnoticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
