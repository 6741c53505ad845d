"""The score of the fault table: which tests hold each row, and how many cases held in this run.

A test counts as one case, or as the number of times that it called the `case` fixture.
"""
import json
import platform
import time
from pathlib import Path

import pytest

ROWS = {
    "F1": ("SIGKILL during saves", "test_a_kill_during_a_save_", "test_a_run_removes_what_a_killed_save_"),
    "F2": ("a disk that fails at any step", "test_a_disk_that_fails_at_any_step_",
           "test_a_run_whose_disk_fills_up_", "test_a_metrics_file_that_cannot_be_written_"),
    "F3": ("resume at every step", "test_a_run_stopped_at_any_step_", "test_every_arm_stopped_at_any_step_",
           "test_every_block_trains_stops_", "test_a_growing_run_resumes_", "test_an_annealed_top_k_resumes_",
           "test_resume_is_exact_across_epochs_"),
    "F4": ("signals", "test_a_signal_ends_a_run_", "test_a_second_signal_", "test_a_signal_keeps_the_best_"),
    "F5": ("damaged checkpoints", "test_damage_is_noticed_", "test_without_an_intact_checkpoint_",
           "test_exchanged_files_", "test_a_flipped_bit_outside_"),
    "F6": ("what is not a number", "test_one_bad_batch_", "test_skipped_steps_change_neither_",
           "test_too_many_skipped_steps_", "test_a_learning_rate_out_of_this_world_",
           "test_weights_that_are_not_finite_", "test_a_validation_loss_that_is_not_finite_",
           "test_a_bad_number_in_one_place_", "test_a_finite_spike_", "test_one_rank_with_nan_"),
    "F7": ("bad data files", "test_an_id_outside_the_vocabulary_is_named_", "test_a_file_of_odd_size_",
           "test_a_truncated_file_", "test_an_empty_file_", "test_a_file_shorter_", "test_a_wrong_dtype_",
           "test_a_folder_without_meta_and_", "test_data_of_a_larger_", "test_tokens_of_another_",
           "test_one_flipped_bit_", "test_a_bad_meta_json_is_refused", "test_a_missing_file_is_refused"),
    "F8": ("bad command lines", "test_bad_command_lines_", "test_a_bad_word_", "test_a_bad_config_file_",
           "test_every_config_comes_back_", "test_no_command_line_ends_", "test_resuming_with_another_shape_",
           "test_a_misspelt_config_file_", "test_a_name_that_no_file_can_have_"),
    "F9": ("hostile files", "test_resuming_from_a_damaged_", "test_sampling_from_a_damaged_",
           "test_a_pickle_payload_", "test_a_name_that_is_no_plain_folder_",
           "test_a_manifest_names_no_file_"),
    "F10": ("several processes, one curve", "test_processes_share_one_batch_", "test_sharded_weights_",
            "test_torchrun_trains_", "test_ranks_share_no_window_"),
    "F11": ("a rank is killed", "test_a_killed_rank_"),
    "F12": ("looking does not change a run", "test_looking_at_a_run_"),
    "F13": ("cached decode", "test_cached_decode_equals_", "test_prompts_of_different_lengths_"),
    "F14": ("kernels against references", "test_a_product_of_a_program_equals_",
            "test_attention_of_one_query_", "test_gathered_rows_equal_", "test_gathered_units_equal_",
            "test_the_packed_product_equals_",
            "test_every_op_is_a_good_citizen", "test_the_largest_are_kept_",
            "test_references_have_the_gradients_"),
    "F15": ("no leaks", "test_batches_keep_memory_", "test_ten_thousand_batches_", "test_a_hundred_saves_",
            "test_a_gigabyte_is_prepared_"),
    "F16": ("golden curves", "test_every_arm_follows_its_golden_curve"),
    "F17": ("export", "test_safetensors_come_back_", "test_hugging_face_reads_"),
    "F18": ("any text", "test_any_text_survives_", "test_bytes_that_are_no_text_"),
    "F19": ("metrics only rise", "test_rows_of_metrics_rise_", "test_metrics_rise_whatever_the_clock_"),
    "F20": ("no sockets", "test_the_whole_way_without_a_network"),
    "F22": ("several hosts", "test_two_hosts_", "test_a_host_that_is_killed_",
            "test_hosts_that_do_not_share_", "test_restarts_on_several_hosts_"),
    "F26": ("Hugging Face folders and wrapped names", "test_a_hugging_face_", "test_hugging_face_weights_",
            "test_every_field_of_a_hugging_", "test_fields_that_a_hugging_face_", "test_a_pickle_of_hugging_",
            "test_a_path_means_that_file", "test_prefixes_of_wrapped_", "test_two_prefixes_of_one_name_",
            "test_an_exported_model_samples_", "test_an_export_without_a_tokenizer_",
            "test_the_vocabulary_is_that_of_", "test_a_damaged_vocabulary_of_a_folder_",
            "test_files_of_two_vocabularies_", "test_gpt2s_vocabulary_is_recognised_",
            "test_training_on_with_another_vocabulary_", "test_a_name_that_would_download_",
            "test_gpt2_by_name_is_nanogpts_", "test_a_folders_own_vocabulary_talks"),
    "F27": ("corpora", "test_every_document_is_used_", "test_a_document_that_is_not_used_",
            "test_a_file_that_cannot_be_used_", "test_going_on_", "test_two_preparations_"),
    "F24": ("every script, whatever its streams, words and folders", "test_every_script_",
            "test_real_work_ends_", "test_a_real_pipeline_", "test_a_cache_folder_"),
    "F21": ("two runs, one folder", "test_copies_by_hand_", "test_a_copy_by_hand_", "test_auto_knows_",
            "test_a_second_run_", "test_a_lock_", "test_locks_", "test_of_many_that_find_a_stale_lock_",
            "test_a_new_run_", "test_a_damaged_checkpoint_of_a_new_run_", "test_the_run_before_",
            "test_a_kill_while_the_run_before_", "test_one_id_", "test_a_run_whose_folder_was_taken_",
            "test_an_export_"),
}
BEGAN = time.monotonic()
rows = {}                                        # {row: [held, failed, seconds]}
current = {"cases": 0}


@pytest.fixture(scope="session")
def case():
    """Call it behind each case that held."""
    def held():
        current["cases"] += 1
    return held


def row_of(name):
    return next((row for row, (_, *tests) in ROWS.items() if name.startswith(tuple(tests))), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    row = row_of(item.originalname)
    current["cases"], clock, failed = 0, time.perf_counter(), True
    try:
        result = yield
        failed = False
        return result
    except pytest.skip.Exception:
        failed = row = None
        raise
    finally:
        if row:
            held = current["cases"] if failed else current["cases"] or 1
            item.user_properties.append(("score", (row, held, failed, time.perf_counter() - clock)))


def pytest_runtest_logreport(report):
    """With several workers (-n) the one that runs a test is not the one that prints the table."""
    for name, found in report.user_properties if report.when == "call" else ():
        if name == "score":
            row, *figures = found
            rows[row] = [a + b for a, b in zip(rows.get(row, (0, 0, 0.0)), figures)]


def pytest_addoption(parser):
    parser.addoption("--score", default="", help="also write the fault table as a record, FILE.json")
    parser.addoption("--suite", default="", help="also write this PyTorch's counts into a record, FILE.json")


def record(path, subcommand, command, key, found):
    """Write `found` ({name: its figures}) into a record that `bench.py readme` reads; names that are not in
    it stay as the file has them."""
    from benchmarks.record import SCHEMA, commit_of, hardware, load_average, versions, write_atomically
    from benchmarks import ROOT  # isort: skip
    found = {name: figures | {"commit": commit_of(ROOT)} for name, figures in found.items()}
    old = json.loads(Path(path).read_text(encoding="utf-8"))[key] if Path(path).is_file() else {}
    write_atomically(path, json.dumps({
        "schema": SCHEMA, "subcommand": subcommand, "command": command,
        "hardware": hardware(), "versions": versions(), "commit": {"ours": commit_of(ROOT)},
        "load_average": load_average(), "measurements": {}, key: old | found}) + "\n")


def counts(reporter):
    """{torch version: what this run's tests came to}."""
    import torch
    passed, skipped, failed, errors = (len(reporter.stats.get(key, ()))
                                       for key in ("passed", "skipped", "failed", "error"))
    return {torch.__version__.partition("+")[0]: {
        "passed": passed, "skipped": skipped, "failed": failed + errors,
        "seconds": time.monotonic() - BEGAN, "python": platform.python_version()}}


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--suite"):
        record(config.getoption("--suite"), "suite", "python -m pytest --suite=FILE.json", "suite",
               counts(terminalreporter))
    if config.getoption("--score"):
        record(config.getoption("--score"), "faults", "python -m pytest -m '' --score=FILE.json", "faults",
               {row: {"about": ROWS[row][0], "held": held, "failed": failed, "seconds": seconds}
                for row, (held, failed, seconds) in rows.items()})
    if not rows:
        return
    terminalreporter.section("fault table")
    for row, (about, *_) in ROWS.items():
        if row in rows:
            held, failed, seconds = rows[row]
            terminalreporter.write_line(f"{row:4} {f'{held}/{held + failed}':>12}  {seconds:7.1f} s  {about}")
