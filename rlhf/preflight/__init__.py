"""Before a long run: hosts, versions, network, disks and clocks of all processes."""
