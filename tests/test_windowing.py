import subprocess
import sys

import numpy as np
import pytest

from cspine.windowing import WINDOWS, three_windows, two_and_a_half_d, window


@pytest.fixture
def hu():
    return np.random.default_rng(0).integers(-1024, 3072, (4, 6, 5)).astype('i2')


def test_import_is_light():
    code = ('import sys, time; t = time.perf_counter(); import cspine.windowing; print(time.perf_counter() - t); '
            'sys.exit(bool({"torch", "pydicom", "scipy", "pandas", "matplotlib"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    print(f'import cspine.windowing: {done.stdout.strip()} s')
    assert done.returncode == 0, done.stderr or 'a heavy module was loaded'


def test_the_papers_windows():
    assert WINDOWS == ((2800, 600), (4000, 700), (1800, 400))


@pytest.mark.parametrize('width, level', WINDOWS)
def test_window_is_the_linear_ramp(hu, width, level):
    x = window(hu, width, level)
    expected = np.clip((hu.astype(float) - (level - width/2))/width, 0, 1)
    assert x.dtype == np.float32 and x.shape == hu.shape and np.abs(x - expected).max() < 1e-6
    y = window(hu, width, level, np.uint8)
    assert y.dtype == np.uint8 and np.abs(y - 255*expected).max() <= .501


def test_window_leaves_its_input_alone(hu):
    before, f = hu.copy(), hu.astype('f4')
    window(hu, 1800, 400), window(f, 1800, 400)
    assert (hu == before).all() and (f == before).all()


def test_channels_stand_before_rows_and_columns(hu):
    x = three_windows(hu)
    assert x.shape == (4, 3, 6, 5) and three_windows(hu[0]).shape == (3, 6, 5)
    assert three_windows(hu[None]).shape == (1, 4, 3, 6, 5)
    for c, w in enumerate(WINDOWS):
        assert (x[:, c] == window(hu, *w)).all()


def test_neighbours(hu):
    x = two_and_a_half_d(hu)
    assert x.shape == (4, 3, 6, 5) and x.dtype == hu.dtype
    for n in range(4):
        for c, k in enumerate((max(n - 1, 0), n, min(n + 1, 3))):
            assert (x[n, c] == hu[k]).all()
    assert two_and_a_half_d(hu, around=2).shape == (4, 5, 6, 5)
    assert (two_and_a_half_d(hu[:1]) == hu[0]).all()
    with pytest.raises(ValueError, match='volume'):
        two_and_a_half_d(hu[0])


@pytest.mark.parametrize('dtype', ['float32', 'uint8'])
@pytest.mark.parametrize('stored', ['int16', 'int32', 'float32', 'float64'])
def test_torch_gives_the_same(hu, dtype, stored):
    torch = pytest.importorskip('torch')
    a = hu.astype(stored)
    t = torch.from_numpy(a.copy())
    for got, expected in ((window(t, 1800, 400, dtype), window(a, 1800, 400, dtype)),
                          (window(t, 1800, 400, getattr(torch, dtype)), window(a, 1800, 400, dtype)),
                          (three_windows(t, dtype=dtype), three_windows(a, dtype=dtype)),
                          (two_and_a_half_d(t), two_and_a_half_d(a))):
        assert isinstance(got, torch.Tensor) and got.numpy().dtype == expected.dtype
        assert (got.numpy() == expected).all()
    assert (t.numpy() == a).all()


def test_wrong_arguments(hu):
    with pytest.raises(ValueError, match='float32'):
        window(hu, 1800, 400, 'int16')
    with pytest.raises(ValueError, match='wider'):
        window(hu, 0, 400)
