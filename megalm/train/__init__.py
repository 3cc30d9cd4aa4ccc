"""Where model and cluster meet (`build`), and the loop (`trainer`)."""
