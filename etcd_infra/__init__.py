"""An etcd-native coordination toolkit for Python services on Trio."""
