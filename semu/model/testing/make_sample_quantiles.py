#!/usr/bin/env python3
"""Writes semu/model/sample_quantiles.inc: 101 quantiles of each distribution that
sample batches are drawn from.

Run: make_sample_quantiles.py SHARED_DATA_FOLDER > semu/model/sample_quantiles.inc

The folder holds the tables and a README.md with source, path and licence of each
source, which go into the output's comments.
"""

import csv
import gzip
import re
import sys


def rows(folder, table):
    with gzip.open(f'{folder}/{table}.public.csv.gz', 'rt') as f:
        yield from csv.DictReader(f)


def column(folder, table, sources, value):
    out = []
    for row in rows(folder, table):
        if row['source'] in sources:
            v = value(row)
            if v is not None:
                out.append(v)
    return sorted(out)


def number(field):
    return lambda row: float(row[field]) if row[field] else None


def aspect(row):
    """Width over height of pictures of 64 px or more."""
    if not row['width'] or not row['height']:
        return None
    width, height = float(row['width']), float(row['height'])
    return width / height if min(width, height) >= 64 else None


def question_and_answer(row):
    if not row['question_words'] or not row['answer_words']:
        return None
    return float(row['question_words']) + float(row['answer_words'])


# Name, table, sources, value, meaning.
TABLES = [
    ('kImageAspect', 'image',
     ['coco_val2017_captions', 'paco_lvis', 'pascal_voc_2012', 'xm3600'],
     aspect, 'width over height of an image'),
    ('kCaptionWords', 'image',
     ['coco_val2017_captions', 'iiw_locnar_eval', 'xm3600'],
     number('caption_words'), 'words of an image\'s caption'),
    ('kQuestionWords', 'image', ['screenqa_short', 'mathvista_testmini'],
     question_and_answer, 'words of a question about an image, and its answer'),
    ('kInterleavedImages', 'interleaved', ['myfixit_manual', 'openstax_section'],
     number('n_images'), 'images of an interleaved document'),
    ('kInterleavedWords', 'interleaved', ['myfixit_manual', 'openstax_section'],
     number('n_words'), 'words of an interleaved document'),
    ('kConversationWords', 'conversation', ['sgd_dialogue'], number('n_words'),
     'words of a conversation'),
    ('kPromptWords', 't2v_prompt',
     ['vbench_short', 'vbench_gpt_long', 'vbench_hunyuan_long',
      'vbench_wan_long', 'fetv'],
     number('prompt_words'), 'words of a video\'s prompt'),
    ('kClipSeconds', 'video',
     ['activitynet_captions_clip', 'charades_sta_clip', 'qvhighlights_clip',
      'youcook2_clip'],
     number('duration_s'), 'seconds of a video clip'),
    ('kVideoAspect', 'video_qa', ['nextqa'], aspect,
     'width over height of a video'),
    ('kSpeechSeconds', 'audio',
     ['librispeech_train-clean-100', 'librispeech_dev-clean',
      'commonvoice_id', 'commonvoice_ps'],
     number('duration_s'), 'seconds of an utterance'),
]


def provenance(folder):
    """Table and source to (repo, path, licence), read from the README."""
    found = {}
    table = source = None
    with open(f'{folder}/README.md') as f:
        for line in f:
            line = line.rstrip()
            if line.startswith('## '):
                table = line[3:]
            elif line.startswith('### '):
                source = line[4:]
                found[table, source] = {}
            elif (m := re.match(r'- (repo|repos|path|licence as stated): (.*)',
                                line)):
                found.get((table, source), {})[m[1]] = m[2]
    return found


def quantiles(values):
    out = []
    for k in range(101):
        position = k / 100 * (len(values) - 1)
        low = int(position)
        high = min(low + 1, len(values) - 1)
        out.append(values[low] + (position - low) * (values[high] - values[low]))
    return out


def comment(text):
    words, line = text.split(), '//  '
    for word in words:
        if len(line) + 1 + len(word) > 80 and line.strip() != '//':
            print(line)
            line = '//    '
        line += (' ' if not line.endswith(' ') else '') + word
    print(line)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = sys.argv[1]
    sources = provenance(folder)
    print('// Quantiles 0 %, 1 %, ... 100 % of real samples; no rows of the data.')
    print('// Written by semu/model/testing/make_sample_quantiles.py.')
    for name, table, names, value, meaning in TABLES:
        values = column(folder, table, names, value)
        print(f'\n// {meaning[0].upper()}{meaning[1:]}; {len(values)} samples.')
        for source in names:
            about = sources[table, source]
            repo = about.get('repo', about.get('repos', ''))
            comment(f'{source}: {repo}, {about["path"]}; licence as stated: '
                    f'{about["licence as stated"]}.')
        print(f'constexpr double {name}[101] = {{')
        line = '   '
        for q in quantiles(values):
            text = f' {q:.4g},'
            if len(line) + len(text) > 80:
                print(line)
                line = '   '
            line += text
        print(line)
        print('};')


if __name__ == '__main__':
    main()
