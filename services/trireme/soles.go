package main

import (
	"errors"
	"fmt"
	"net"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
)

// soles are the services of stages of which `trireme up` can run one instance, and why: the address for /metrics that the file of settings
// gives to each instance, which all of them read. A second one could not listen there, and would be started again for ever.
type soles map[string]string

// readSoles reads the file of settings, if there is one.
func readSoles(file string) (soles, error) {
	s := soles{}
	for _, service := range []string{"encoder", "prefill", "decoder", "stage"} {
		address, err := conf.Setting(file, service, "metrics")
		if err != nil {
			return nil, err
		}
		if fixedPort(address) {
			s[service] = address
		}
	}
	return s, nil
}

// fixedPort reports whether one process alone can listen at an address.
func fixedPort(address string) bool {
	_, port, err := net.SplitHostPort(address)
	return err == nil && port != "0" && port != ""
}

// check refuses so many instances of a service, if that is more than there can be.
func (s soles) check(service string, instances int) error {
	address := s[service]
	if address == "" || instances < 2 {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	return fmt.Errorf("%d instances of %s cannot all serve metrics at %s, as the file of settings says: write %s there, and each takes a free port, which "+
		"`trireme status --json` names", instances, service, address, net.JoinHostPort(host, "0"))
}

// checkTopology refuses a topology with more instances than there can be.
func (s soles) checkTopology(t conf.Topology) error {
	count := map[string]int{}
	for _, g := range t.Groups {
		count[bus.ServiceOf(g.Roles)] += g.Count
	}
	var errs []error
	for _, service := range []string{"encoder", "prefill", "decoder", "stage"} {
		errs = append(errs, s.check(service, count[service]))
	}
	return errors.Join(errs...)
}
