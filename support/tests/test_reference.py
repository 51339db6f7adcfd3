"""What samples are compared with, and what is refused."""
import os
import re
import shutil

import numpy as np
from PIL import Image

from support.inception import POOL
from support.reference import Reference
from support.tests.common import refuses, rows_of, said, script, trained_on_folder


def test_facts__of_statistics_name_no_pixels():
    of_all = Reference('s.npz', None, None, None, '', None, None, None, None, None)
    assert of_all.facts() == dict(reference='s.npz', reference_classes=None)


def test_check_data__tells_a_folder_that_changed_from_one_that_moved(two_sets):
    trained_on_folder('A', 'out')
    measure = ['evaluate.py', *'--ckpt out --swd --n 4 --nfe 1 --device cpu'.split()]
    alike = said(measure)
    assert 'others' not in alike
    shutil.move('A', 'moved')
    assert re.search('swd.*', said([*measure, '--dataset', 'moved']))[0].partition('  (')[0] == \
        re.search('swd.*', alike)[0].partition('  (')[0]
    assert 'others' not in said([*measure, '--dataset', 'moved'])
    shutil.copytree('B', 'A')
    refuses(measure, '--dataset of --ckpt A: not the images that out was trained on .as many images'
            ', with other pixels.; if they are meant, give --dataset A')
    assert 'out was trained on others' in said([*measure, '--dataset', 'A'])
    os.remove('moved/cat/3.png')
    assert '(20 images there, 19 here)' in said([*measure, '--dataset', 'moved'])
    rows = rows_of('out/results.jsonl')
    assert rows[0]['reference_pixels'] == rows[1]['reference_pixels']
    assert len({row['reference_pixels'] for row in rows}) == 3


def test_check_same_data__networks_of_two_sets_are_compared_with_a_third_only(two_sets):
    trained_on_folder('A', 'a')
    trained_on_folder('B', 'b')
    shutil.copytree('A', 'copy')
    trained_on_folder('copy', 'c')
    compare = ['evaluate.py', *'--swd --n 4 --sweep nfe=1 --device cpu --compare a'.split()]
    refuses([*compare, 'b'], '--compare: b was trained on B, a on other images, A; say by --datas')
    assert 'a was trained' not in said([*compare, 'c'])  # wherever they are
    out = said([*compare, 'b', '--dataset', 'A'])
    assert 'b was trained on others' in out and 'a was trained on others' not in out
    said([*compare, 'b', '--ref', 'B'])


def test_reference__of_others(tmp_path):
    """Files as ADM and score_sde publish them."""
    rng = np.random.default_rng(0)
    results = tmp_path / 'r.jsonl'
    adm, song, ours, wide = (tmp_path / name for name in ('adm.npz', 'song.npz', 's.npy',
                                                          'wide.png'))
    x = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(adm, arr_0=x, mu=np.zeros(POOL), sigma=np.eye(POOL), mu_s=np.zeros(3))
    np.savez(song, pool_3=rng.standard_normal((9, POOL)).astype(np.float32))
    np.save(ours, x)
    Image.new('RGB', (9, 12), (9, 99, 200)).save(wide)
    common = ['evaluate.py', '--inception', 'random', '--device', 'cpu', '--results', results,
              '--workers', 0, '--samples']
    out = said([*common, ours, '--ref', adm, '--prc', '--swd'])
    assert 'adm.npz: its mu and sigma for --fid, its 6 images for --prc --swd' in out
    row = rows_of(results)[-1]
    assert row['precision'] == row['recall'] == 1 and row['swd'] == 0
    script([*common, ours, '--ref', song, '--kid'])
    assert rows_of(results)[-1]['n_ref'] == 9
    refuses([*common, ours, '--ref', song, '--kid', '--swd'],
            'do for --fid --is --kid --prc only')
    refuses([*common, ours, '--ref', adm, '--swd', '--save_stats', tmp_path / 's.npz'],
            'do for --fid --is only')
    refuses([*common, wide, '--ref', ours, '--swd', '--image_size', 16],
            "--samples .*wide.png: 'wide.png' is 9x12; give an --image_size of at most 9, not 16")
    refuses([*common, ours, '--ref', ours, '--kid', '--n', 7], '--n 7: --samples .* has 6 images')
