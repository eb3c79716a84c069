package main

import (
	"errors"
	"fmt"
	"net"
	"strings"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
)

// soles are the services of which `trireme up` can run one instance, and why: the address for /metrics that the file of settings gives to each
// instance, which all of them read. A second one, or another service, could not listen there, and would be started again for ever.
type soles map[string]string

// measured are the services with such an address, stages first, by their commands.
var measured = []string{"encoder", "prefill", "decoder", "stage", "hmm", "scaler run"}

// readSoles reads the file of settings, if there is one.
func readSoles(file string) (soles, error) {
	s := soles{}
	for _, service := range measured {
		address, err := conf.Setting(file, append(strings.Fields(service), "metrics")...)
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

// checkTopology refuses a topology with more instances than there can be, or with two services at one address; others are services that are no
// stages, of which there is one each.
func (s soles) checkTopology(t conf.Topology, others ...string) error {
	count := map[string]int{}
	for _, g := range t.Groups {
		count[bus.ServiceOf(g.Roles)] += g.Count
	}
	for _, service := range others {
		count[service] = 1
	}
	var errs []error
	has := map[string]string{}
	for _, service := range measured {
		address := s[service]
		if address == "" || count[service] == 0 {
			continue
		}
		if other := has[address]; other != "" {
			errs = append(errs, fmt.Errorf("%s and %s cannot both serve metrics at %s, as the file of settings says: give each another port, or 0 for a free one",
				other, service, address))
		}
		has[address] = service
		errs = append(errs, s.check(service, count[service]))
	}
	return errors.Join(errs...)
}

// checkAddress refuses what nobody can listen at, whatever else runs on the machine; "" is nothing to listen at.
func checkAddress(flag, address string) error {
	if address == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("%w%s %s is no address like 127.0.0.1:9101 or :9101: %w", errUsage, flag, address, err)
	}
	return nil
}
