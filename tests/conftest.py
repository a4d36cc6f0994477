"Every test starts from the same random state"
import random, numpy as np, torch, pytest

def seed(k): random.seed(k); np.random.seed(k); torch.manual_seed(k)
seed(0)                                                  # for what modules draw when they are imported

@pytest.fixture(autouse=True)
def seeded(): seed(0)
