"""scikit-learn's grid search on the ranks of an MPI run, by way of joblib.

    mpiexec -n 4 python examples/pool_joblib.py
"""

from joblib import parallel_config
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from jd_hpc import Pool, register_parallel_backend

if __name__ == "__main__":
    with Pool() as pool:
        register_parallel_backend()
        X, y = load_iris(return_X_y=True)
        search = GridSearchCV(SVC(), {"C": [0.1, 1.0, 10.0, 100.0], "gamma": [0.01, 0.1, 1.0]}, cv=5)
        with parallel_config("jd_hpc", pool=pool):
            search.fit(X, y)
        print(f"best {search.best_params_}, {search.best_score_:.3f} of the flowers right")
