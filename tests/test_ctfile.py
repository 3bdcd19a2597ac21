"""One file: multi-frame objects, files that are no slices, headers that lie, decoders that hang or crash, mutations."""
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pydicom
import pytest
from test_dicom import block, edit, same

import cspine.ctfile as ctfile
from cspine.ctfile import LOSSY, SYNTAXES, Damaged, Decoders, encode_frame, read_header, stream_size
from cspine.dicom import DamagedSeries, NoPixels, NoSeries, NotCT, read_series, write_series
from cspine.oddities import write_enhanced


def enhanced(hu, affine, path, **how):
    write_enhanced(write_series(hu, affine, path), **how)
    return path


@pytest.mark.parametrize('how', [dict(), dict(slopes=[1, 2] * 6), dict(syntax='jpeg_lossless'), dict(syntax='jpegls', table=False),
                                 dict(syntax='jpeg_lossless', fragments=3), dict(syntax='jpeg2000', fragments=2, table=False)], ids=str)
def test_enhanced_multi_frame(tmp_path, how):
    hu, affine = block()
    hu -= hu % 2
    volume = same(read_series(enhanced(hu, affine, tmp_path / 'e', **how)), hu, affine)
    assert volume.notes == (['rescale differs between slices; each read by its own'] if 'slopes' in how else [])


def test_an_offset_table_of_zeros_is_no_table(tmp_path):
    hu, affine = block()
    path = enhanced(hu, affine, tmp_path / 'e', syntax='jpeg_lossless', fragments=2) / 'all.dcm'
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack('<HHI', 0xFFFE, 0xE000, 4*len(hu))) + 8
    raw[at:at + 4*len(hu)] = bytes(4*len(hu))
    path.write_bytes(raw)
    same(read_series(path.parent), hu, affine)


def test_one_multi_frame_file_is_a_study_of_its_own(tmp_path):
    hu, affine = block()
    same(read_series(enhanced(hu, affine, tmp_path / 'e') / 'all.dcm'), hu, affine)


def test_a_multi_frame_file_that_is_cut_off(tmp_path):
    hu, affine = block()
    path = enhanced(hu, affine, tmp_path / 'e') / 'all.dcm'
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    notes = read_series(path.parent).notes
    assert notes == ['1 damaged slice filled from the neighbours: frame 12 of all.dcm is cut off']
    path.write_bytes(good[:-3000])
    with pytest.raises(DamagedSeries, match='frame .* of all.dcm is cut off'):
        read_series(path.parent)


def test_frames_without_places_are_no_series(tmp_path):
    folder = enhanced(*block(), tmp_path / 'e', drop=['PerFrameFunctionalGroupsSequence'])
    with pytest.raises(NoSeries, match='12 frames in one file and does not say where they lie'):
        read_series(folder)


def test_files_that_are_no_slices_have_errors_of_their_own(tmp_path):
    def study(name, remove=(), **change):
        folder = write_series(*block((1, 8, 8)), tmp_path / name)
        edit(folder / '1.dcm', **change, **dict.fromkeys(remove))
        return folder
    for name, kind, words, how in (
            ('dose', NoPixels, 'is a report', dict(Modality='SR', remove=['PixelData', 'Rows', 'Columns'])),
            ('empty', NoPixels, 'holds no pixel data', dict(remove=['PixelData'])),
            ('shot', NoSeries, 'secondary capture', dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.7', ImagePositionPatient=None))):
        with pytest.raises(kind, match=words):
            read_series(study(name, **how))


def test_a_header_that_claims_60000_pixels_costs_nothing(tmp_path):
    folder = write_series(*block((1, 8, 8)), tmp_path / 'a')
    edit(folder / '1.dcm', Rows=60000, Columns=60000)
    with pytest.raises(DamagedSeries, match='60000 x 60000 pixels'):
        read_series(folder)
    stream = bytearray(encode_frame(np.arange(64, dtype='u2').reshape(8, 8), 'jpeg2000'))
    stream[8:16] = struct.pack('>II', 60000, 60000)
    assert stream_size(bytes(stream)) == (60000, 60000)
    with Decoders() as decode, pytest.raises(Damaged, match='8 x 8 pixels, its jpeg2000 stream has 60000 x 60000'):
        decode(bytes(stream), 'jpeg2000', 8, 8)


def test_a_decoder_that_hangs_is_stopped_and_the_next_frame_gets_another(monkeypatch):
    monkeypatch.setattr(ctfile, 'FRAME_LIMIT', 1)
    values = np.random.default_rng(0).integers(0, 4000, (48, 40)).astype('u2')
    stream, start = encode_frame(values, 'jpegls'), time.monotonic()
    with Decoders() as decode:
        assert (decode(stream, 'jpegls', 48, 40) == values).all()
        os.kill(decode.all[0].process.pid, signal.SIGSTOP)  # as good as a hang
        with pytest.raises(Damaged, match='more than 1 s'):
            decode(stream, 'jpegls', 48, 40)
        assert time.monotonic() - start < 30
        assert (decode(stream, 'jpegls', 48, 40) == values).all()
        decode.all[-1].process.kill()  # as a crash would
        with pytest.raises(Damaged, match='crashed'):
            decode(stream, 'jpegls', 48, 40)
        assert (decode(stream, 'jpegls', 48, 40) == values).all()
    assert all(c.process.poll() is not None for c in decode.all)


def test_a_process_that_does_not_start_is_a_damaged_slice_not_a_traceback(tmp_path, monkeypatch):
    folder = write_series(*block((2, 8, 8)), tmp_path / 'a', syntax='jpegls')
    monkeypatch.setattr(ctfile.sys, 'executable', shutil.which('false'))
    with pytest.raises(DamagedSeries, match='[12].dcm cannot be read .no process to decode in could be started'):
        read_series(folder)


def test_bytes_without_preamble_and_the_wrong_encoding(tmp_path):
    hu, affine = block((2, 8, 8))
    folder = write_series(hu, affine, tmp_path / 'a', syntax='implicit')
    for p in folder.iterdir():
        b = p.read_bytes()
        p.write_bytes(b[b.index(b'\x08\0\x08\0'):])  # the data set alone
    assert same(read_series(folder), hu, affine).notes == []
    folder = write_series(hu, affine, tmp_path / 'b')
    for p in folder.iterdir():  # says implicit, is explicit
        b, uid = p.read_bytes(), SYNTAXES['explicit'].encode()
        i = b.index(uid)
        p.write_bytes(b[:i] + SYNTAXES['implicit'].encode().ljust(len(uid) + 1, b'\0') + b[i + len(uid) + 1:])
    same(read_series(folder), hu, affine)


def without_a_vr(folder, vr):
    "Give every file of a series a private element with these two bytes for a value representation."
    for p in folder.iterdir():
        ds = pydicom.dcmread(p)
        e = '>' if ds.file_meta.TransferSyntaxUID == SYNTAXES['big_endian'] else '<'
        ds.add_new(0x00090010, 'LO', 'SOMEBODY')
        ds.add_new(0x00091001, 'LO', 'abcd')
        ds.save_as(p)
        b, tag = p.read_bytes(), struct.pack(f'{e}HH', 9, 0x1001)
        assert b.count(tag + b'LO') == 1
        p.write_bytes(b.replace(tag + b'LO', tag + vr))
    return folder


@pytest.mark.parametrize('vr', [b'\0\0', b'??', b'--', b'  '])
@pytest.mark.parametrize('syntax', ['explicit', 'big_endian', 'jpeg_lossless'])
def test_an_element_without_a_value_representation(tmp_path, syntax, vr):
    hu, affine = block((2, 9, 8))
    folder = without_a_vr(write_series(hu, affine, tmp_path, syntax=syntax), vr)
    assert same(read_series(folder), hu, affine).notes == []


def test_a_value_representation_that_nobody_knows_is_damage(tmp_path):
    folder = without_a_vr(write_series(*block((1, 9, 8)), tmp_path), b'A1')
    at = (folder / '1.dcm').read_bytes().index(struct.pack('<HH', 9, 0x1001))
    with pytest.raises(DamagedSeries, match=f'1.dcm has a damaged header .no value representation at byte {at}.'):
        read_series(folder)


@pytest.mark.parametrize('syntax', [s for s in SYNTAXES if s not in LOSSY])
def test_what_pydicom_has_to_read_is_as_exact(tmp_path, syntax, monkeypatch):
    def lost(*args):
        raise ValueError('somewhere')
    hu, affine = block((2, 33, 21))
    write_series(hu, affine, tmp_path, syntax=syntax)
    monkeypatch.setattr(ctfile, '_header', lost)
    assert same(read_series(tmp_path), hu, affine).notes == []


def say(path, element, text):
    "Write a decimal string into a file, whatever it says: pydicom would not."
    b = path.read_bytes()
    at = b.index(struct.pack('<HH2s', 0x28, element, b'DS')) + 6
    end = at + 2 + struct.unpack_from('<H', b, at)[0]
    path.write_bytes(b[:at] + struct.pack('<H', len(text) + len(text) % 2) + text.encode() + b' ' * (len(text) % 2) + b[end:])


SLOPE, INTERCEPT = 0x1053, 0x1052


@pytest.mark.parametrize('element, text, says', [
    (SLOPE, '0', 'rescale slope of 0'), (SLOPE, '0.0', 'rescale slope of 0'), (SLOPE, '1e30', r'rescale slope of 1e\+30'),
    (SLOPE, '-5000', 'rescale slope of -5000'), (SLOPE, '1e-6', 'rescale slope of 1e-06'), (SLOPE, 'nan', "unreadable rescale slope .'nan'"),
    (SLOPE, '1e999', "unreadable rescale slope .'1e999'"), (SLOPE, '1,0,0', "unreadable rescale slope .'1,0,0'"),
    (INTERCEPT, '-1024a', "unreadable rescale intercept .'-1024a'"), (INTERCEPT, '1e6', r'rescale intercept of 1e\+06')])
def test_a_rescale_that_makes_no_hounsfield_units(tmp_path, element, text, says):
    hu, affine = block((30, 8, 8))
    folder = write_series(hu, affine, tmp_path / 'a')
    say(folder / '15.dcm', element, text)  # one slice: left out, filled from its neighbours
    volume = read_series(folder)
    assert (volume.hu[:14] == hu[:14]).all() and (volume.hu[15:] == hu[15:]).all() and len(volume.notes) == 2
    assert re.match(f'left out 1 file: 15.dcm has an? {says}', volume.notes[0]) and 'gap' in volume.notes[1]
    for p in folder.iterdir():
        say(p, element, text)
    with pytest.raises(DamagedSeries, match=f'has an? {says}'):
        read_series(folder)


@pytest.mark.parametrize('element, text', [(SLOPE, '-1'), (SLOPE, '17'), (SLOPE, '0.015'), (INTERCEPT, '-8192'), (INTERCEPT, '31743.5')])
def test_an_unusual_rescale_is_taken_at_its_word(tmp_path, element, text):
    folder = write_series(*block((1, 8, 8)), tmp_path / 'a')
    stored = pydicom.dcmread(folder / '1.dcm').pixel_array.astype(float)
    say(folder / '1.dcm', element, text)
    hu = stored*float(text) - 1024 if element == SLOPE else stored + float(text)
    assert (read_series(folder).hu[0] == np.clip(np.rint(hu), -32768, 32767)).all()


def test_no_rescale_is_noted_not_refused(tmp_path):
    folder = write_series(*block((2, 8, 8)), tmp_path / 'a')
    for p in folder.iterdir():
        say(p, INTERCEPT, '')
    assert read_series(folder).notes == ['no rescale slope or intercept in some files; taken as 1 and 0']


def test_frames_with_a_rescale_that_makes_no_hounsfield_units(tmp_path):
    hu, affine = block()
    with pytest.raises(DamagedSeries, match='all.dcm has a rescale slope of 5000'):
        read_series(enhanced(hu, affine, tmp_path / 'e', slopes=[1] * 11 + [5000]))


@pytest.mark.parametrize('sop_class, ends', [
    ('4', 'is MR Image Storage, not CT'), ('4.1', 'is Enhanced MR Image Storage, not CT'),
    ('128', 'is Positron Emission Tomography Image Storage, not CT'), ('999.9', 'is 1.2.840.10008.5.1.4.1.1.999.9, not CT'),
    ('2', []), ('', ['files do not say their modality; taken for CT'])])
def test_without_a_modality_the_sop_class_decides(tmp_path, sop_class, ends):
    hu, affine = block((2, 8, 8))
    for p in write_series(hu, affine, tmp_path).iterdir():
        ds = pydicom.dcmread(p)
        del ds.Modality
        if sop_class:
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = f'1.2.840.10008.5.1.4.1.1.{sop_class}'
        else:
            del ds.SOPClassUID, ds.file_meta.MediaStorageSOPClassUID
        ds.save_as(p, enforce_file_format=False)
    if isinstance(ends, list):
        assert same(read_series(tmp_path), hu, affine).notes == ends
    else:
        with pytest.raises(NotCT, match=ends):
            read_series(tmp_path)


def test_an_enhanced_file_without_a_modality_is_ct(tmp_path):
    hu, affine = block()
    edit(enhanced(hu, affine, tmp_path / 'e') / 'all.dcm', Modality=None)
    assert same(read_series(tmp_path / 'e'), hu, affine).notes == []


def mutated(root, n):
    "What becomes of `n` mutations of the files root/*.seed (bit flips, cuts, overwritten lengths), in a process that survives them: outcome -> number."
    code = f'''
import collections, json, logging, resource, warnings, numpy as np
from pathlib import Path
import cspine.ctfile as c
from cspine.dicom import _hu, Damaged
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL); c.FRAME_LIMIT = .5
root, ends = Path({str(root)!r}), collections.Counter()
seeds = [p.read_bytes() for p in sorted(root.glob("*.seed"))]
path = root/"x.dcm"
with c.Decoders() as decode:
    for i in range({n}):
        r = np.random.default_rng(i); b = bytearray(seeds[i % len(seeds)]); kind = (i // len(seeds)) % 5
        at = lambda: int(r.integers(132, len(b)))
        if kind == 0: b = b[:at()]
        elif kind == 1: b[at()] ^= 1 << int(r.integers(8))
        elif kind == 2:
            for _ in range(int(r.integers(2, 12))): b[at()] = int(r.integers(256))
        elif kind == 3: a = at(); b[a:a+4] = bytes([255, 255, 255, int(r.integers(256))][:int(r.integers(2, 5))])
        else: a = at(); b[a:a+int(r.integers(1, 40))] = bytes(int(r.integers(0, 40)))
        path.write_bytes(b)
        try:
            for s in c.read_header(path)[:3]: ends["read" if _hu(s, decode).shape == s.size else "shape"] += 1
        except c.Unusable: ends["refused"] += 1
        except Damaged as e: ends["hang" if "took" in str(e) else "crash" if "crashed" in str(e) else "damaged"] += 1
print(json.dumps(ends))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


def test_ten_thousand_mutated_files(tmp_path):
    "Each is read or refused by our own error."
    for syntax in ('explicit', 'jpeg_lossless'):
        path = enhanced(*block((3, 24, 20)), tmp_path / f'enhanced_{syntax}', syntax=syntax) / 'all.dcm'
        path.rename(tmp_path / f'z_{syntax}.seed')
    y, x = np.mgrid[:24, :20]
    hu = (20*x + 13*y + np.random.default_rng(0).normal(0, 30, (1, 24, 20))).astype('i2')
    for k, s in enumerate(SYNTAXES):
        (write_series(hu, np.diag([-1., 1, 1, 1])[:, [2, 1, 0, 3]], tmp_path / s, syntax=s) / '1.dcm').rename(tmp_path / f'{k:02}.seed')
    ends = mutated(tmp_path, 10_000)
    assert 'shape' not in ends and min(ends['read'], ends['refused'], ends['damaged']) > 500 and sum(ends.values()) >= 10_000


def test_a_slice_has_the_numbers_of_its_header(tmp_path):
    folder = write_series(*block((1, 8, 8)), tmp_path / 'a')
    s, = read_header(folder / '1.dcm')
    assert s.size == (8, 8) and s.pixel == (.5, .4) and s.name == '1.dcm' and s.axial


def test_an_htj2k_stream_that_breaks_off_half_way_is_damage_not_pixels():
    "imagecodecs lets the error pass and gives what the memory held"
    values = (np.arange(48*40).reshape(48, 40)*7 % 4000).astype('u2')
    stream, said = encode_frame(values, 'htj2k'), 0
    with Decoders() as decode:
        for k in range(120, 160):
            broken = bytearray(stream)
            broken[k] ^= 0xff
            try:
                decode(bytes(broken), 'htj2k', 48, 40)
            except Damaged as e:
                said += 'ojph' in str(e)
        assert (decode(stream, 'htj2k', 48, 40) == values).all()   # the process is none the worse
    assert said > 10


def test_threads_that_begin_at_once_write_sound_htj2k():
    code = (
        'import os, sys, threading, numpy as np\nfrom concurrent.futures import ThreadPoolExecutor\nfrom cspine.ctfile import encode_frame\n'
        'import imagecodecs\nframes = np.random.default_rng(0).integers(0, 3000, (24, 12, 10)).astype("u2")\n'
        'def sound():\n'
        '    together = threading.Barrier(4)\n'
        '    def encode(i):\n'
        '        if i < 4: together.wait()\n'
        '        return encode_frame(frames[i], "htj2k")\n'
        '    with ThreadPoolExecutor(4) as pool: streams = list(pool.map(encode, range(24)))\n'
        '    return all((imagecodecs.htj2k_decode(s) == f).all() for s, f in zip(streams, frames))\n'
        'bad = 0\n'
        'for _ in range(100):\n'
        '    child = os.fork()\n'
        '    if not child: os._exit(0 if sound() else 1)\n'
        '    bad += os.waitpid(child, 0)[1] != 0\n'
        'sys.exit(f"{bad} of 100 processes wrote damaged frames" if bad else 0)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-200:]
