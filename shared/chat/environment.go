package chat

import (
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/nikolalohinski/gonja/v2/builtins"
	"github.com/nikolalohinski/gonja/v2/exec"
)

// newEnvironment returns gonja's builtins with those replaced that differ from Jinja2 and Python where it matters.
func newEnvironment() *exec.Environment {
	globals := exec.NewContext(map[string]any{"range": rangeList})
	for _, name := range []string{"namespace", "dict", "joiner", "cycler"} {
		if f, ok := builtins.GlobalFunctions.Get(name); ok {
			globals.Set(name, f)
		}
	}
	filters := exec.NewFilterSet(map[string]exec.FilterFunction{}).Update(builtins.Filters)
	filters.Update(exec.NewFilterSet(map[string]exec.FilterFunction{
		"tojson": tojson, "items": itemsFilter, "string": stringFilter,
	}))
	tests := exec.NewTestSet(map[string]exec.TestFunction{}).Update(builtins.Tests)
	tests.Update(exec.NewTestSet(map[string]exec.TestFunction{
		"true":     test(func(v *exec.Value) bool { return v.IsBool() && v.Bool() }),
		"false":    test(func(v *exec.Value) bool { return v.IsBool() && !v.Bool() }),
		"sequence": test(func(v *exec.Value) bool { return v.IsString() || v.IsList() || v.IsDict() }),
	}))
	methods := builtins.Methods
	methods.Str = exec.NewMethodSet(stringMethods(builtins.Methods.Str))
	methods.Dict = exec.NewMethodSet(dictMethods(builtins.Methods.Dict))
	return &exec.Environment{
		Context:           globals,
		Filters:           filters,
		Tests:             tests,
		ControlStructures: builtins.ControlStructures,
		Methods:           methods,
	}
}

// test makes a test of a predicate.
func test(is func(*exec.Value) bool) func(*exec.Context, *exec.Value, *exec.VarArgs) (bool, error) {
	return func(_ *exec.Context, in *exec.Value, _ *exec.VarArgs) (bool, error) { return is(in), nil }
}

// maxRange bounds range(); Jinja's sandbox has the same limit.
const maxRange = 100_000

// rangeList is range() as a list; gonja's is a goroutine that waits forever if the loop ends early.
func rangeList(_ *exec.Evaluator, params *exec.VarArgs) (list, error) {
	begin, end, step := 0, 0, 1
	for _, a := range params.Args {
		if !a.IsInteger() {
			return nil, errors.New("range: the arguments are not integers")
		}
	}
	switch a := params.Args; len(a) {
	case 1:
		end = a[0].Integer()
	case 2:
		begin, end = a[0].Integer(), a[1].Integer()
	case 3:
		begin, end, step = a[0].Integer(), a[1].Integer(), a[2].Integer()
	default:
		return nil, fmt.Errorf("range: %d arguments", len(a))
	}
	if step == 0 {
		return nil, errors.New("range: the step is zero")
	}
	out := list{}
	for i := begin; step > 0 && i < end || step < 0 && i > end; i += step {
		if len(out) == maxRange {
			return nil, fmt.Errorf("range: more than %d elements", maxRange)
		}
		out = append(out, i)
	}
	return out, nil
}

// pairsOf returns the keys and values of a dictionary in its order.
func pairsOf(v *exec.Value) list {
	out := list{}
	for _, k := range v.Keys() {
		value, _ := v.GetItem(k.String())
		out = append(out, list{k.Interface(), value.Interface()})
	}
	return out
}

func itemsFilter(_ *exec.Evaluator, in *exec.Value, _ *exec.VarArgs) *exec.Value {
	switch {
	case in.IsError():
		return in
	case in.IsNil():
		return exec.AsValue(list{})
	case !in.IsDict():
		return exec.AsValue(fmt.Errorf("items: %s is not a mapping", in.String()))
	}
	return exec.AsValue(pairsOf(in))
}

// stringFilter writes None as Python does; gonja's leaves it out.
func stringFilter(_ *exec.Evaluator, in *exec.Value, _ *exec.VarArgs) *exec.Value {
	switch {
	case in.IsError():
		return in
	case in.IsNil():
		return exec.AsValue("None")
	}
	return exec.AsValue(in.String())
}

// dictMethods are those of dictionaries. gonja hands methods a sorted copy; self is the dictionary itself.
func dictMethods(builtin *exec.MethodSet[map[string]any]) map[string]exec.Method[map[string]any] {
	column := func(i int) exec.Method[map[string]any] {
		return func(_ map[string]any, self *exec.Value, _ *exec.VarArgs) (any, error) {
			out := list{}
			for _, p := range pairsOf(self) {
				out = append(out, p.(list)[i])
			}
			return out, nil
		}
	}
	methods := map[string]exec.Method[map[string]any]{
		"items": func(_ map[string]any, self *exec.Value, _ *exec.VarArgs) (any, error) { return pairsOf(self), nil },
		"keys":  column(0), "values": column(1),
		"get": func(_ map[string]any, self *exec.Value, args *exec.VarArgs) (any, error) {
			if len(args.Args) == 0 {
				return nil, errors.New("get: no key")
			}
			if v, ok := self.GetItem(args.Args[0].String()); ok {
				return v.Interface(), nil
			}
			if len(args.Args) > 1 {
				return args.Args[1].Interface(), nil
			}
			if v, ok := args.KwArgs["default"]; ok {
				return v.Interface(), nil
			}
			return nil, nil
		},
	}
	if copied, ok := builtin.Get("copy"); ok {
		methods["copy"] = copied
	}
	return methods
}

// stringMethods are those of strings: gonja's where they are right.
func stringMethods(builtin *exec.MethodSet[string]) map[string]exec.Method[string] {
	methods := map[string]exec.Method[string]{}
	for _, name := range []string{
		"capitalize", "format", "isalnum", "isalpha", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle",
		"isupper", "join", "ljust", "lower", "removeprefix", "removesuffix", "rjust", "swapcase", "title", "upper",
		"zfill",
	} {
		if m, ok := builtin.Get(name); ok {
			methods[name] = m
		}
	}
	maps.Copy(methods, map[string]exec.Method[string]{
		"strip":      strip(strings.TrimFunc, strings.Trim),
		"lstrip":     strip(strings.TrimLeftFunc, strings.TrimLeft),
		"rstrip":     strip(strings.TrimRightFunc, strings.TrimRight),
		"startswith": affix(strings.HasPrefix),
		"endswith":   affix(strings.HasSuffix),
		"split":      split(false),
		"rsplit":     split(true),
		"splitlines": func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
			keep := len(args.Args) > 0 && args.Args[0].IsTrue() || args.KwArgs["keepends"] != nil && args.KwArgs["keepends"].IsTrue()
			return splitLines(s, keep), nil
		},
		"replace": replace,
		"count": func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
			sub, err := stringArgument("count", args)
			return strings.Count(s, sub), err
		},
		"find": func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
			sub, err := stringArgument("find", args)
			return runeIndex(s, strings.Index(s, sub)), err
		},
		"rfind": func(s string, _ *exec.Value, args *exec.VarArgs) (any, error) {
			sub, err := stringArgument("rfind", args)
			return runeIndex(s, strings.LastIndex(s, sub)), err
		},
	})
	return methods
}
