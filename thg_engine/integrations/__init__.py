"""Where thg_engine meets other libraries; nothing else in it knows them."""
