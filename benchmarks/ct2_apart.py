"""ctranslate2 in a process of its own, which bench.py decode starts. Once it has run, OpenMP counts more
threads than processors in the whole process, and the barriers of every other engine there wait asleep:
llama.cpp's step took four times as long.

Writes what it computes in, then for every line [ids, new] that it reads the new ids, greedy: JSON.
"""
import json
import sys


def main(folder, stored, threads):
    from ctranslate2 import Generator
    generator = Generator(folder, device="cpu", compute_type=stored, inter_threads=1,
                          intra_threads=int(threads))
    print(json.dumps(generator.compute_type), flush=True)
    for line in sys.stdin:
        ids, new = json.loads(line)
        found, = generator.generate_batch(
            [[str(number) for number in ids]], max_length=new, beam_size=1, sampling_topk=1,
            end_token=[], include_prompt_in_result=False)       # no id ends a text
        print(json.dumps(found.sequences_ids[0]), flush=True)
