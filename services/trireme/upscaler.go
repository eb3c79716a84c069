package main

import (
	"fmt"

	"trireme.dev/services/trireme/supervise"
)

// scalerFlags say whether `trireme up` runs a scaler.
type scalerFlags struct {
	Scaler       string `help:"Whether the number of NPUs of each stage is decided by itself: off, advise (decisions are told: trireme explain) or auto (and carried out)." enum:"off,advise,auto" default:"off"`
	ScalerPolicy string `help:"Policy file of the scaler, as scaler.yaml, whose mode --scaler stands above; read again when it changes." type:"path" placeholder:"FILE"`
}

// check refuses a policy that cannot be used, or the scaler would say it again and again.
func (f *scalerFlags) check() error {
	switch {
	case f.ScalerPolicy == "":
		return nil
	case f.Scaler == "off":
		return fmt.Errorf("%w--scaler-policy %s: nothing is decided by it without --scaler advise or auto", errUsage, f.ScalerPolicy)
	}
	_, err := readPolicy(f.ScalerPolicy)
	return err
}

// scaler is its process; nil: there is none.
func (f *scalerFlags) scaler(child func(name, service string, args ...string) supervise.Child) *supervise.Child {
	if f.Scaler == "off" {
		return nil
	}
	args := []string{"run", "--mode", f.Scaler}
	if f.ScalerPolicy != "" {
		args = append(args, "--policy", f.ScalerPolicy)
	}
	return new(child("scaler", "scaler", args...))
}

// scalerNames are the names of its processes.
func (f *scalerFlags) scalerNames() []string {
	if f.Scaler == "off" {
		return nil
	}
	return []string{"scaler"}
}
