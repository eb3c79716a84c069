package main

import "testing"

func TestTooOldNATS(t *testing.T) {
	for version, want := range map[string]bool{
		"1.4.1": true, "2.9.25": true, "2.11.9": true, "2.12.0": false, "2.15.2": false, "2.16.0-dev": false, "3.0.0": false, "": false,
	} {
		if tooOld(version) != want {
			t.Errorf("nats-server %q: %v", version, !want)
		}
	}
}
