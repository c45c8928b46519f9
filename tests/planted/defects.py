"""The defects that planted.py plants: each is one that a refactoring could bring in, and that trains, saves or tells wrongly.

Nothing here crashes at once: a defect that no test would miss is not worth planting. `old` is in its file exactly once, so
that code which moves takes its defect along.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """One change of the source.

    Attributes:
        name: for --only.
        what: what the change does, in a few words.
        file: from the project's root.
        old, new: the text that is there, and what is put in its place.
        tests: pytest's selectors of quick tests that are expected to fail.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PACKING = (
    Defect(
        "chosen-leaks-into-rejected", "the rejected answer attends to the chosen one instead of the prompt",
        "rlhf/packing/attention.py",
        "parts.append((slice(own, end), [slice(start, start + p), slice(own, end)], bias))",
        "parts.append((slice(own, end), [slice(start + c, own), slice(own, end)], bias))",
        ("tests/packing/test_packed_attention.py::test_chosen_does_not_reach_rejected",),
    ),
    Defect(
        "rows-leak", "a packed row is one document: each pair attends to the pairs before it",
        "rlhf/packing/backbone.py",
        '"packed_segments": segments,',
        '"packed_segments": Segments([(layout.num_tokens, 0, 0)], input_ids.device),',
        ("tests/packing/test_packed_backbone.py::test_batches",),
    ),
    Defect(
        "position-ids-go-on", "position_ids are not restarted in each segment",
        "rlhf/packing/layout.py",
        "positions.append(torch.arange(p + c))",
        "positions.append(torch.arange(start, start + p + c))",
        ("tests/packing/test_packed_layout.py::test_two_pairs_are_rows_i_and_i_plus_half",),
    ),
    Defect(
        "layout-of-another-batch", "the backbone takes a layout that was made for a batch of another shape",
        "rlhf/packing/collate.py",
        "packed.mode == mode and packed.shape == tuple(input_ids.shape)",
        "packed.mode == mode",
        ("tests/packing/test_collate.py::test_it_fits_only_its_batch",),
    ),
    Defect(
        "host-copy-of-before", "a mask that was changed in place is read as it was when it was collated",
        "rlhf/packing/known.py",
        "if (now := version(self.plain)) != self._at:",
        "if (now := version(self.plain)) < self._at:",
        (
            "tests/packing/test_known.py::test_a_change_in_place_is_not_read_from_the_host",
            "tests/packing/test_known.py::test_nor_is_one_through_a_view",
        ),
    ),
    Defect(
        "rejected-after-chosen", "position_ids of the rejected answer go on where the chosen one ended",
        "rlhf/packing/layout.py",
        "positions.append(torch.arange(p, p + r))",
        "positions.append(torch.arange(p + c, p + c + r))",
        ("tests/packing/test_packed_layout.py::test_worked_example",),
    ),
    Defect(
        "causal-top-left", "the causal rule of the shared prefix is aligned to the top left",
        "rlhf/packing/attention.py",
        ".tril(p) for p, _, r in self.lengths]",
        ".tril() for p, _, r in self.lengths]",
        ("tests/packing/test_packed_attention.py::test_equals_dense_mask",),
    ),
    Defect(
        "varlen-keys-of-queries", "the varlen call takes the lengths of the queries for those of the keys",
        "rlhf/packing/attention.py",
        "for x in (query_lengths, key_lengths)",
        "for x in (query_lengths, query_lengths)",
        ("tests/packing/test_packed_attention.py::test_varlen_plan_example",),
    ),
    Defect(
        "prefix-takes-all", "an answer that begins the other keeps no token of its own",
        "rlhf/packing/layout.py",
        "torch.minimum(chosen_length, rejected_length) - 1).clamp(min=0)",
        "torch.minimum(chosen_length, rejected_length)).clamp(min=0)",
        ("tests/packing/test_packed_layout.py::test_pair",),
    ),
    Defect(
        "prompt-gradient-overwritten", "the prompt gets the gradient of the rejected answer only, not of both",
        "rlhf/packing/attention.py",
        "total[:, :, part] += grad[:, :, at : at + length]",
        "total[:, :, part] = grad[:, :, at : at + length]",
        ("tests/packing/test_packed_attention.py::test_equals_dense_mask",),
    ),
    Defect(
        "window-one-too-long", "a row of one token more than the sliding window is packed, as if there were none",
        "rlhf/packing/backbone.py",
        "(longest := longest_sequence(layout.segments)) > window",
        "(longest := longest_sequence(layout.segments)) > window + 1",
        ("tests/packing/test_windows.py::test_a_row_beyond_the_window_is_computed_padded",),
    ),
    Defect(
        "window-is-no-reason", "a model is packed although its rows exceed the sliding window",
        "rlhf/packing/backbone.py",
        "if window is not None and (longest is None or longest > window):",
        "if window is not None and longest is not None and longest > window + 1:",
        ("tests/packing/test_windows.py::test_both_numbers_and_what_to_set",),
    ),
    Defect(
        "opt-stays-padded", "OPT's plain calls go past the packed forward, and are padded without a word",
        "rlhf/packing/backbone.py",
        'if backbone.config.model_type == "opt" else None',
        'if backbone.config.model_type == "none" else None',
        ("tests/packing/test_families.py::test_logits_of_a_plain_call",),
    ),
    Defect(
        "experts-key-is-dropped", "experts_implementation is taken and never reaches the model",
        "rlhf/training/model_checks.py",
        "base.set_experts_implementation(plan.stage_args.experts_implementation)",
        "base.get_experts_implementation()",
        ("tests/training/test_model_checks.py::test_experts_implementations_train_alike",),
    ),
    Defect(
        "longest-row-of-a-pair-twice", "the longest row of a pair is counted as long as both rows",
        "rlhf/training/lengths.py",
        'rows = 1 if plan.recipe.stage == "sft" else 2',
        "rows = 1",
        ("tests/training/test_windowed.py::test_a_run_goes_by_its_longest_row",),
    ),
    Defect(
        "head-gradient-unscaled", "the gradient through the LM head leaves out temperature and logit scale",
        "rlhf/packing/lm_head.py",
        ".add_(weight_VH[targets_N]).mul_(scale)",
        ".add_(weight_VH[targets_N])",
        ("tests/packing/test_lm_head.py::test_equals_trl",),
    ),
)  # fmt: skip

_SHARE = 'share = part["examples"] * world / inputs["examples"]'

TRAINING = (
    Defect(
        "micro-batches-weigh-alike", "each micro-batch has the same weight, however many pairs it holds",
        "rlhf/training/trainer.py", _SHARE,
        'share = 1 / len(inputs["micro_batches"])',
        ("tests/training/test_trainer.py::test_the_split_changes_no_number[dpo]",),
    ),
    Defect(
        "weight-by-tokens", "DPO's and the reward model's loss is normalised by tokens instead of pairs",
        "rlhf/training/trainer.py", _SHARE,
        'sizes = [int(p["batch"]["attention_mask"].sum()) for p in inputs["micro_batches"]]\n'
        '        share = int(part["batch"]["attention_mask"].sum()) * world / sum(sizes)',
        ("tests/training/test_trainer.py::test_the_split_changes_no_number[reward]",),
    ),
    Defect(
        "sft-weight-by-examples", "SFT's loss, a mean over tokens, is weighted by examples once more",
        "rlhf/training/trainer.py",
        "self._step_weight = float(part[\"examples\"] > 0) if by_tokens else share",
        "self._step_weight = share",
        ("tests/training/test_trainer.py::test_the_split_changes_no_number[sft]",),
    ),
    Defect(
        "partial-batch-as-full", "the last, smaller global batch of an epoch is divided by the full batch size",
        "rlhf/training/trainer.py", _SHARE,
        'share = part["examples"] * world / self._global["size"]',
        ("tests/training/test_trainer.py::test_the_smaller_last_batch_is_a_mean_too",),
    ),
    Defect(
        "partial-batch-dropped", "the last, smaller global batch of an epoch is left out",
        "rlhf/training/batching.py",
        "steps_per_epoch = -(-num_examples // global_batch_size)",
        "steps_per_epoch = max(1, num_examples // global_batch_size)",
        ("tests/training/test_batching.py::test_an_epoch_takes_every_row_once",),
    ),
    Defect(
        "shuffle-by-world-size", "the order of the rows depends on the number of processes",
        "rlhf/training/trainer.py",
        "global_batch_size=size, seed=seed)",
        "global_batch_size=size, seed=seed + self.accelerator.num_processes - 1)",
        ("tests/training/test_trainer.py::test_every_world_size_takes_the_same_examples",),
    ),
    Defect(
        "idle-process-counts", "a process that only computes along counts its example a second time (SFT)",
        "rlhf/training/trainer.py",
        "self._step_weight = float(part[\"examples\"] > 0) if by_tokens else share",
        "self._step_weight = 1.0 if by_tokens else share",
        ("tests/training/test_trainer.py::test_every_world_size_takes_the_same_examples",),
    ),
    Defect(
        "metrics-of-last-micro-batch", "a step's metrics are plain means over its micro-batches",
        "rlhf/training/step_means.py",
        'self.sums[name] += value * weight if weight else 0.0',
        'weight = bool(weight)\n                self.sums[name] += value * weight',
        ("tests/training/test_trainer.py::test_the_split_changes_no_number[dpo]",),
    ),
    Defect(
        "metrics-of-one-rank", "metrics that are read later are those of the first rank",
        "rlhf/training/deferred.py",
        "part.reshape(-1, *x.shape[1:])",
        "part[:1].reshape(-1, *x.shape[1:])",
        ("tests/training/test_deferred.py::test_the_same_numbers",),
    ),
    Defect(
        "metrics-waited-for", "each metric of each micro-batch is read at once: on a GPU a dozen waits per micro-batch",
        "rlhf/training/step_metrics.py",
        "with deferring(self.accelerator, self._pending):",
        "with contextlib.nullcontext():",
        ("tests/training/test_synchronisations.py::test_batches_of_trl_wait_when_they_are_logged[sft]",),
    ),
    Defect(
        "norm-in-fp32", "the squares of a gradient are added in fp32 on CPUs",
        "rlhf/distributed/sharding.py",
        "exact = piece.double()",
        "exact = piece",
        ("tests/training/test_precision.py::test_squares_are_added_in_float64",),
    ),
    Defect(
        "reference-in-fp32", "the reference's log-probability of an answer is rounded to fp32",
        "rlhf/training/precision.py",
        "torch.tensor(values, dtype=torch.float64)",
        "torch.tensor(values)",
        ("tests/training/test_precision.py::test_references_stay_float64",),
    ),
    Defect(
        "qlora-adapter-rounded", "a QLoRA adapter that is trained further keeps what TRL's cast to bf16 left of it",
        "rlhf/training/precision.py",
        "(parameter if reference is None else reference)",
        "parameter",
        ("tests/training/test_precision.py::test_a_qlora_adapter_is_float32",),
    ),
    Defect(
        "pad-is-eos", "a tokenizer whose pad token is its EOS token is left so",
        "rlhf/models/tokenizer.py",
        "if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:",
        "if tokenizer.pad_token is not None:",
        ("tests/models/test_models.py::test_pad_equal_to_eos_is_replaced_from_the_vocabulary",),
    ),
    Defect(
        "no-eos-in-labels", "Alpaca's template ends an answer without EOS",
        "rlhf/models/chat_templates/alpaca.jinja",
        '{{ "\\n\\n### Response:\\n" + message["content"].rstrip() + end }}',
        '{{ "\\n\\n### Response:\\n" + message["content"].rstrip() }}',
        ("tests/training/test_classic.py::test_eos_is_in_the_labels_of_every_alpaca_row",),
    ),
    Defect(
        "any-eos-will-do", "a template is taken that has EOS before the answer, and none after it",
        "rlhf/models/tokenizer.py",
        "if tokenizer.eos_token_id not in complete[len(prompt) :]:",
        "if tokenizer.eos_token_id not in complete:",
        ("tests/models/test_models.py::test_a_template_without_eos_is_refused",),
    ),
    Defect(
        "reward-head-unseeded", "the reward model's new head is drawn before the recipe's seed is set",
        "rlhf/training/reward.py",
        "    set_seed(args.seed)  # loading initialises",
        "    # loading initialises",
        ("tests/training/test_trainer.py::test_the_split_changes_no_number[reward]",),
    ),
    Defect(
        "template-not-from-recipe", "SFT and DPO take the model's own chat template, not the recipe's",
        "rlhf/training/sft.py",
        "load_tokenizer(plan.model_name, plan.stage_args.chat_template, trust, revision=revision)",
        "load_tokenizer(plan.model_name, None, trust, revision=revision)",
        ("tests/training/test_stages.py::test_every_stage_takes_the_recipes_template",),
    ),
    Defect(
        "start-never-checked", "the guard of DPO's loss at step 0 is never asked",
        "rlhf/training/dpo.py",
        "if not self._start_checked and self.state.global_step == 0 and",
        "if not self._start_checked and self.state.global_step == 1 and",
        ("tests/training/test_stages.py::test_dpo_with_another_reference_is_stopped",),
    ),
    Defect(
        "not-finite-goes-on", "a loss that is not finite is forgotten if the step's last micro-batch has a finite one",
        "rlhf/runs/checkpointing.py",
        "self.fault_tolerance.finite = now if before is None else before & now",
        "self.fault_tolerance.finite = now",
        ("tests/runs/test_stop.py::test_a_loss_that_is_not_finite_ends_the_run",),
    ),
)  # fmt: skip

REFERENCE = (
    Defect(
        "reference-without-adapter", "the cache's key leaves out the adapter that is the reference",
        "rlhf/training/reference.py",
        'if "ref" in getattr(model, "peft_config", {}):',
        "if False:",
        ("tests/training/test_reference.py::test_reference_key_of_an_adapter_that_goes_on",),
    ),
    Defect(
        "reference-without-precision", "the cache's key leaves out the precision that the reference computes in",
        "rlhf/training/reference.py",
        "autocast=trainer.accelerator.mixed_precision, device=args.device.type,",
        "device=args.device.type,",
        ("tests/training/test_reference.py::test_what_else_decides_the_values_is_in_the_key",),
    ),
    Defect(
        "reference-without-template", "the cache's key covers the answers, not the prompt that a template writes",
        "rlhf/training/tokenise.py",
        'digest.update(np.array([len(ids), num_prompt, *ids], dtype=np.int64).tobytes())',
        'digest.update(np.array([len(ids), num_prompt, *row[side]], dtype=np.int64).tobytes())',
        ("tests/training/test_reference.py::test_pair_key_changes_with",),
    ),
    Defect(
        "reference-of-another-row", "reference values go to the rows in another order than they were computed",
        "rlhf/training/reference.py",
        "missing.logps[numbers] = values",
        "missing.logps[np.sort(numbers)] = values",
        ("tests/training/test_reference.py::test_values_are_trls_own_in_the_order_of_the_rows[lora-values0]",),
    ),
    Defect(
        "damaged-reference-trusted", "a damaged file of the reference cache is read",
        "rlhf/training/reference.py",
        "if hashlib.sha256(content).hexdigest() != path.stem:",
        "if not content:",
        ("tests/training/test_reference.py::test_a_damaged_file_is_not_trusted",),
    ),
)  # fmt: skip

_PLACE = """    write_file(partial / MANIFEST, json.dumps({"files": files, **more}) + "\\n")
    for directory in {partial, *(f.parent for f in partial.rglob("*"))}:
        sync_folder(directory)
    if folder.exists():
        remove_checkpoint(folder)
    os.rename(partial, folder)
"""

RUNS = (
    Defect(
        "no-second-moment", "a checkpoint leaves out Adam's second moment",
        "rlhf/runs/portable.py",
        "for place, (kind, tensor) in enumerate(part.tensors.items()):\n",
        'for place, (kind, tensor) in enumerate(part.tensors.items()):\n            if kind == "exp_avg_sq":\n                continue\n',
        ("tests/runs/test_portable.py::test_what_is_in_it",),
    ),
    Defect(
        "schedule-starts-again", "a resumed run starts its learning rate's schedule from the beginning",
        "rlhf/runs/portable.py",
        "scheduler.last_epoch = int(self.last_epoch)",
        "scheduler.last_epoch = 0",
        ("tests/runs/test_portable.py::test_goes_on_from_ranges_to_the_bit[sft]",),
    ),
    Defect(
        "ranges-with-holes", "of what several ranks hold, the last element of each rank's piece is not written",
        "rlhf/distributed/ranges.py",
        "low, high = (totals[each.copies] * min(n, writers) // writers for n in (each.copy, each.copy + 1))",
        "low, high = (totals[each.copies] * min(n, writers) // writers - n + each.copy for n in (each.copy, each.copy + 1))",
        ("tests/distributed/test_ranges.py::test_every_element_is_written_once",),
    ),
    Defect(
        "holes-not-noticed", "a checkpoint that does not hold every element counts as one that does",
        "rlhf/distributed/ranges.py",
        "last = np.roll(first, -1) if len(first) else first",
        "last = np.zeros_like(first)",
        ("tests/distributed/test_ranges.py::test_what_is_missing_or_there_twice_is_found",),
    ),
    Defect(
        "read-shifted", "a rank copies a range of a checkpoint to the start of its own",
        "rlhf/runs/portable.py",
        "into[low - wanted.held.start : high - wanted.held.start].copy_(values)",
        "into[: high - low].copy_(values)",
        ("tests/distributed/test_ranges.py::test_any_engine_reads_what_another_wrote",),
    ),
    Defect(
        "checksums-not-verified", "a checkpoint's checksums are written and never compared",
        "rlhf/runs/checkpoints.py",
        "_file_damage(folder, name, noted, verify)",
        "_file_damage(folder, name, noted, False)",
        ("tests/runs/test_checkpoint.py::test_a_changed_bit_is_found_when_the_content_is_read",),
    ),
    Defect(
        "resume-from-damaged", "a run resumes from its newest checkpoint without reading it",
        "rlhf/runs/resume.py",
        "checkpoint_damage(Path(path), verify=True, part=rank(), parts=world_size())",
        "checkpoint_damage(Path(path))",
        ("tests/runs/test_checkpoint.py::test_a_run_resumes_from_a_checkpoint_that_it_has_read",),
    ),
    Defect(
        "named-before-manifest", "a checkpoint has its name before its manifest is written",
        "rlhf/runs/checkpoints.py", _PLACE,
        _PLACE.split("\n", 1)[1] + _PLACE.split("\n", 1)[0].replace("partial", "folder") + "\n",
        ("tests/runs/test_checkpoint.py::test_a_checkpoint_is_on_the_disk_before_it_has_its_name",),
    ),
    Defect(
        "named-before-fsync", "a checkpoint has its name before its files are on the disk",
        "rlhf/runs/checkpoints.py",
        "        sync_file(file)\n        found[",
        "        found[",
        ("tests/runs/test_checkpoint.py::test_a_checkpoint_is_on_the_disk_before_it_has_its_name",),
    ),
    Defect(
        "half-deleted-looks-whole", "a checkpoint is deleted with its manifest among the rest, not first",
        "rlhf/runs/checkpoints.py",
        "    (folder / MANIFEST).unlink(missing_ok=True)\n    shutil.rmtree(folder)",
        "    shutil.rmtree(folder)",
        ("tests/runs/test_checkpoint.py::test_a_half_deleted_checkpoint_is_not_whole",),
    ),
    Defect(
        "two-runs-in-a-folder", "two runs may write the same folder at a time",
        "rlhf/files.py",
        "if lock_file(self.file):",
        "if lock_file(self.file, shared=True):",
        ("tests/runs/test_checkpoint.py::test_two_runs_cannot_write_one_folder",),
    ),
    Defect(
        "rotation-keeps-oldest", "save_total_limit keeps the oldest checkpoints",
        "rlhf/runs/checkpoints.py",
        "old = complete[: -max(keep, 1)] if keep else []",
        "old = complete[max(keep, 1) :] if keep else []",
        ("tests/runs/test_checkpoint.py::test_rotation_keeps_the_newest_and_the_best",),
    ),
    Defect(
        "complete-before-verified", "complete.json is written before the model was loaded again and compared",
        "rlhf/training/finish.py",
        'say("Writing the model, reading it again and comparing ...")',
        'finish_run(run, {"stage": stage.name, "steps": trainer.state.global_step})',
        ("tests/training/test_stages.py::test_a_model_that_reads_back_otherwise_is_not_complete",),
    ),
    Defect(
        "not-a-number-is-equal", "a written model whose logits are NaN is taken for the trained one",
        "rlhf/models/saving.py",
        "    if not difference <= tolerance:",
        "    if difference > tolerance:",
        ("tests/training/test_stages.py::test_a_model_that_reads_back_otherwise_is_not_complete",),
    ),
    Defect(
        "complete-run-trains-again", "a run that is complete is trained again, over its finished model",
        "rlhf/training/run.py",
        "    if inputs.run.complete:\n        return announce_complete(stage, inputs.run)\n    say(",
        "    say(",
        ("tests/training/test_stages.py::test_a_complete_stage_is_skipped_untouched",),
    ),
    Defect(
        "changed-data-unnoticed", "a run resumes on data that is not what it was",
        "rlhf/runs/folder.py",
        "recorded = _inputs_before(folder) if inputs else {}",
        "recorded = {}",
        ("tests/runs/test_checkpoint.py::test_changed_data_is_noticed",),
    ),
    Defect(
        "adapter-left-out", "an adapter is evaluated, and chats, as its base",
        "rlhf/models/inference.py",
        "    if is_adapter(name):\n        from peft import PeftModel",
        "    if not name:\n        from peft import PeftModel",
        ("tests/models/test_inference.py::test_an_adapter_stays_on_its_base",),
    ),
    Defect(
        "wrong-exit-code", "a run that was stopped ends with exit code 0, as if it were complete",
        "rlhf/__main__.py",
        "return exit_code_stopped()",
        "exit_code_stopped()\n        return 0",
        ("tests/runs/test_stop.py::test_stopped_while_the_reference_is_computed",),
    ),
    Defect(
        "another-exit-code", "a stopped run ends with another code than the 85 that Slurm's and the cloud's scripts know",
        "rlhf/runs/stop.py",
        "EXIT_STOPPED = 85  #",
        "EXIT_STOPPED = 75  #",
        ("tests/runs/test_status.py::test_stopped_and_complete",),
    ),
    Defect(
        "pipeline-trains-on", "the pipeline starts the next stage after one that was stopped under a launcher",
        "launch/pipeline.sh",
        'if [ -e "$RLHF_STOP_FILE.done" ]; then exit 85; fi',
        'if [ -e "$RLHF_STOP_FILE.done" ]; then continue; fi',
        ("tests/test_layout.py::test_pipeline_ends_with_the_stage_that_was_stopped",),
    ),
    Defect(
        "ranks-disagree-to-stop", "a request to stop that one process has heard is not one to all",
        "rlhf/runs/stop.py",
        "torch.distributed.ReduceOp.MAX, group=self._group)",
        "torch.distributed.ReduceOp.MIN, group=self._group)",
        ("tests/runs/test_stop.py::test_a_request_to_one_process_is_one_to_all",),
    ),
    Defect(
        "error-of-main-rank-only", "an error of the main rank is not told to the other ranks, which wait for it",
        "rlhf/distributed/processes.py",
        "except Exception as failure:  # of any type: re-raised below, once the other ranks know",
        "except UserError as failure:",
        ("tests/distributed/test_fail_together.py::test_the_other_ranks_are_told_before_an_error_is_raised",),
    ),
    Defect(
        "token-in-provenance", "a token of the hub is written to provenance.json",
        "rlhf/runs/folder.py",
        'if k != "token" and not k.endswith("_token")}',
        'if k != "token"}',
        ("tests/runs/test_checkpoint.py::test_provenance_holds_no_token",),
    ),
)  # fmt: skip

PREPARED = (
    Defect(
        "line-at-a-range-lost", "a line that begins where a range of a large file begins is in no range",
        "rlhf/data/json_reader.py",
        "file.seek(max(start - 1, 0))",
        "file.seek(start)",
        ("tests/data/test_large_files.py::test_a_boundary_at_every_byte",),
    ),
    Defect(
        "blank-lines-not-counted", "places of a large file's rows leave out blank lines of earlier ranges",
        "rlhf/data/json_reader.py",
        "number += 1\n                yield line",
        "number += bool(line.strip())\n                yield line",
        ("tests/data/test_large_files.py::test_json_lines[blank lines]",),
    ),
    Defect(
        "shape-of-each-range", "rows of a large file are compared with the first of their range",
        "rlhf/data/convert.py",
        'Report(shape=job["shape"])',
        "Report()",
        ("tests/data/test_large_files.py::test_rows_of_mixed_shapes_are_measured_by_the_first_of_the_file",),
    ),
    Defect(
        "format-not-in-the-key", "prepared rows are used again when the recipe says something else of their format",
        "rlhf/data/prepare.py",
        "self.options.key(), ",
        "",
        ("tests/data/test_prepare.py::test_what_makes_another_preparation",),
    ),
    Defect(
        "part-of-others-trusted", "a prepared folder that lacks rows is used",
        "rlhf/data/prepare.py",
        'if len(rows) == found["rows"]:',
        "if rows is not None:",
        ("tests/data/test_prepare.py::test_a_damaged_preparation_is_made_again[a part of others]",),
    ),
    Defect(
        "failure-not-passed-on", "a process that waits for prepared rows which can't be made tries again itself",
        "rlhf/data/prepare.py",
        "if waited and (error := ",
        "if not waited and (error := ",
        ("tests/data/test_prepare.py::test_what_fails_for_one_process_fails_for_the_waiting_one_at_once",),
    ),
    Defect(
        "cut-unchecked", "texts are encoded in pieces whatever the tokenizer",
        "rlhf/training/tokenise.py",
        "return alone if alone and same_when_split(tokenizer, alone[0]) else []",
        "return alone",
        ("tests/training/test_tokens.py::test_which_tokenizers_encode_in_pieces",),
    ),
    Defect(
        "cut-beyond-what-is-shared", "the part that is encoded once reaches beyond what a pair's texts share",
        "rlhf/training/tokenise.py",
        "at = texts[0].rfind(token, 0, shared)",
        "at = texts[0].rfind(token)",
        ("tests/training/test_tokens.py::test_where_texts_are_cut", "tests/training/test_tokens.py::test_ids_and_labels_are_trls[byte level-dpo]"),
    ),
    Defect(
        "chunk-of-two", "two processes tokenise the same chunk",
        "rlhf/training/tokens.py",
        "if not lock_file(lock) or counted.exists():",
        "if counted.exists():",
        ("tests/training/test_tokens.py::test_two_processes_share_the_chunks",),
    ),
    Defect(
        "ids-of-other-settings", "token ids are used again when max_length or too_long has changed",
        "rlhf/training/tokens.py",
        "            dataclasses.asdict(settings_of(plan)),\n            plan.data.keys[side],",
        "            plan.data.keys[side],",
        ("tests/training/test_tokens.py::test_what_makes_another_folder",),
    ),
    Defect(
        "other-rows-of-a-step", "the rows of a step are not those of earlier releases",
        "rlhf/training/batching.py",
        "default_rng([seed, epoch])",
        "default_rng([epoch, seed])",
        ("tests/training/test_batching.py::test_the_rows_of_a_step_by_hand",),
    ),
    Defect(
        "half-a-key", "a cached reference is found by half of its pair's key",
        "rlhf/training/reference.py",
        " | (halves[1][order][1:] != halves[1][order][:-1])",
        "",
        ("tests/training/test_reference.py::test_look_up",),
    ),
)  # fmt: skip

DATA = (
    Defect(
        "held-out-trained-on", "the rows that are held out stay in the training data",
        "rlhf/data/rows.py",
        "return whole.mixed(np.flatnonzero(~sides), recipe)",
        "return whole.mixed(np.arange(len(sides)), recipe)",
        ("tests/data/test_heldout.py::test_the_quickstart_copied_for_one_csv",),
    ),
    Defect(
        "held-out-by-columns", "which rows are held out depends on columns and answers, not on the prompt alone",
        "rlhf/data/features.py",
        "opening = prompts[0] if len(prompts) == 1 == len(spoken) else prompt_hash(spoken[:1])",
        "opening = own",
        ("tests/data/test_heldout.py::test_all_stages_agree_whatever_the_order_and_the_columns",),
    ),
    Defect(
        "seen-called-held-out", "an evaluation looks only at what its last model was trained on",
        "rlhf/evaluation/overlap.py",
        "seen |= hits",
        "seen = hits",
        ("tests/data/test_heldout.py::test_overlap_follows_the_runs_that_a_model_came_from",),
    ),
    Defect(
        "skipped-not-counted", "a row that can't be used is left out without being counted",
        "rlhf/data/convert.py",
        "report.bad.append((line, str(error)))",
        "pass",
        ("tests/data/test_columns.py::test_rows_that_cannot_be_used_are_left_out",),
    ),
    Defect(
        "key-ignored", "the recipe's own keys (packing, reference, ...) are read and not used",
        "rlhf/config/build.py",
        "return args, model_args, recipe.ours",
        "return args, model_args, type(recipe.ours)()",
        ("tests/config/test_config.py::test_each_key_reaches_the_class_that_owns_it",),
    ),
    Defect(
        "no-effect-unnoticed", "a key that has no effect in this recipe is not refused",
        "rlhf/config/recipe_checks.py",
        "        if reason := without_effect(key, stage, values, decided):",
        "        if reason := None and without_effect(key, stage, values, decided):",
        ("tests/config/test_refusals.py::test_key_without_effect",),
    ),
    Defect(
        "report-unescaped", "text of models and data is HTML in the report",
        "rlhf/evaluation/report.py",
        "autoescape=True",
        "autoescape=False",
        ("tests/evaluation/test_report.py::test_hostile_text_stays_text",),
    ),
    Defect(
        "logps-one-late", "an evaluation scores each answer's tokens by the position after the right one",
        "rlhf/inference/score.py",
        "logits_to_keep=keep, use_cache=False).logits[:, :-1]",
        "logits_to_keep=keep, use_cache=False).logits[:, 1:]",
        ("tests/models/test_models.py::test_log_probabilities_by_hand",),
    ),
    Defect(
        "answers-padded-right", "an evaluation's prompts are padded on the right before it generates",
        "rlhf/inference/generate.py",
        'padding_side="left"',
        'padding_side="right"',
        ("tests/models/test_models.py::test_answers_do_not_depend_on_their_batch",),
    ),
    Defect(
        "ties-are-wins", "a tie of two answers counts as a win",
        "rlhf/evaluation/statistics.py",
        "return 0.5 if a == b else float(a > b)",
        "return float(a >= b)",
        ("tests/evaluation/test_evaluate.py::test_compare",),
    ),
    Defect(
        "first-answer-wins", "a judge that prefers whichever answer it reads first decides",
        "rlhf/evaluation/judging.py",
        'return {("A", "B"): 1.0, ("B", "A"): 0.0}.get(verdicts, 0.5)',
        'return {"A": 1.0, "B": 0.0}.get(verdicts[0], 0.5)',
        ("tests/evaluation/test_judging.py::test_both_orders_have_to_agree",),
    ),
    Defect(
        "judge-paid-twice", "a judge's replies are not kept, so that a restart asks again",
        "rlhf/evaluation/endpoint.py",
        'self._keep({"key": key, "text": reply.text, "why": reply.why})',
        "pass",
        ("tests/evaluation/test_judging.py::test_no_reply_is_paid_twice",),
    ),
    Defect(
        "noise-of-the-batch", "a sampled answer depends on its place in the batch",
        "rlhf/evaluation/sampled.py",
        "[(row, 0) for row in prompts]",
        "[(place, 0) for place, _ in enumerate(prompts)]",
        ("tests/evaluation/test_sampled.py::test_an_answer_depends_on_its_row_and_seed_alone",),
    ),
    Defect(
        "length-swapped", "the length control takes the other model's lengths for the model's",
        "rlhf/evaluation/paired.py",
        "np.asarray(lengths, float) - np.asarray(other_lengths, float)",
        "np.asarray(other_lengths, float) - np.asarray(lengths, float)",
        ("tests/evaluation/test_paired.py::test_two_lengths_by_hand",),
    ),
    Defect(
        "own-judge-called-independent", "the verdict does not say that its judge was trained on the policy's own pairs",
        "rlhf/runs/verdict.py",
        'if set(found["data"]) & set(trained["data"]):',
        'if set(found["data"]) == {name}:',
        ("tests/evaluation/test_verdict.py::test_a_judge_of_the_same_pairs_is_said_to_be_one",),
    ),
    Defect(
        "embedded-unverified", "the embedded model is taken without comparing its checksum",
        "rlhf/models/embedded.py",
        "if digest != GGUF_SHA256:",
        "if not digest:",
        ("tests/models/test_embedded.py::test_wheel_with_another_gguf",),
    ),
    Defect(
        "first-experts-everywhere", "under FSDP2 every rank loads the first experts instead of its own",
        "rlhf/models/converted.py",
        "for source in group[rows]",
        "for source in group[: rows.stop - rows.start]",
        ("tests/models/test_converted.py::test_any_rows_are_those_that_transformers_makes",),
    ),
    Defect(
        "experts-read-whole", "under FSDP2 every rank reads all experts of a layer and keeps its own",
        "rlhf/models/converted.py",
        "if _stacks(first) and",
        "if False and _stacks(first) and",
        ("tests/models/test_converted.py::test_any_rows_are_those_that_transformers_makes",),
    ),
    Defect(
        "rows-joined-from-zero", "of joined tensors each is taken from its own first row on",
        "rlhf/models/converted.py",
        "max(rows.start - start, 0), min(",
        "0, min(",
        ("tests/models/test_converted.py::test_any_rows_are_those_that_transformers_makes",),
    ),
)  # fmt: skip

WORK = (
    Defect(
        "neighbours-numbers", "the samples of a prompt have the random numbers of the next prompt's",
        "rlhf/inference/sampling.py",
        "np.random.SeedSequence((seed, row, sample))",
        "np.random.SeedSequence((seed, row + sample))",
        ("tests/inference/test_sampling.py::test_every_answer_has_numbers_of_its_own_and_a_longer_one_the_same_first_ones",),
    ),
    Defect(
        "token-before", "the token before the one that the random number picks is taken",
        "rlhf/inference/sampling.py",
        "token_R1.clamp_(max=scores_RV.shape[-1] - 1)",
        "(token_R1 - 1).clamp_(min=0)",
        ("tests/inference/test_sampling.py::test_a_grid_of_numbers_picks_each_token_as_often_as_its_probability_says",),
    ),
    Defect(
        "numbers-from-the-prompt-on", "the random numbers of an answer depend on how its batch is padded",
        "rlhf/inference/sampling.py",
        "step = input_ids.shape[1] - self.width",
        "step = input_ids.shape[1] % self.uniforms_RT.shape[1]",
        ("tests/inference/test_sampling.py::test_an_answer_does_not_depend_on_its_batch",),
    ),
    Defect(
        "block-by-the-batch", "values are kept in the order in which batches end",
        "rlhf/inference/blocks.py",
        "return [found[item] for item in self.items(block)]",
        "return list(found.values())",
        ("tests/inference/test_blocks.py::test_interrupted_work_ends_with_the_same_values_and_computes_nothing_twice",),
    ),
    Defect(
        "sides-exchanged", "the scores of a batch of pairs are given to the wrong pairs",
        "rlhf/inference/score_command.py",
        "[found[at :: len(batch)] for at in range(len(batch))]",
        "[found[width * at : width * (at + 1)] for at in range(len(batch))]",
        ("tests/inference/test_score_command.py::test_pairs_in_order_with_both_scores_and_their_other_columns",),
    ),
    Defect(
        "cut-answers-taught", "pairs are made of answers that were cut",
        "rlhf/inference/label_command.py",
        'and (keep_cut or answer["finished"])',
        "",
        ("tests/inference/test_label_command.py::test_the_best_against_the_worst",),
    ),
)  # fmt: skip

DEFECTS = (*PACKING, *TRAINING, *REFERENCE, *RUNS, *PREPARED, *DATA, *WORK)
